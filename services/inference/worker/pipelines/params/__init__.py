"""params: bodies of AUTOMATIC1111's API -> typed params and warnings.

  reading.py     JSON as clients send it, and what is said of a field that is wrong
  painting.py    txt2img and img2img, with their override_settings
  control.py     units in alwayson_scripts.controlnet
  scripts.py     the other alwayson_scripts
  cutting.py     rembg
  enlarging.py   extra-single-image, extra-batch-images

What is out of range is refused with the field, what was got and what is allowed; what the webui
knows and has no effect here goes to the warnings.
"""
