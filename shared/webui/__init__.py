"""What bodies written for AUTOMATIC1111's webui mean, as far as that needs no models.

titles.py       the names that people use for model files
body_names.py   which models a body names
settings.py     what a deployment decides about bodies
styles.py       prompts that have a name
values.py       flags and numbers, however they are written
"""
