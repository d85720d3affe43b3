"""models: what lies in model files, and what is kept of them in memory.

files.py         safetensors and scanned pickles: names, shapes, tensors
families.py      the configs of each family, and of a file
configs.py       what a config in a file's metadata may say
layouts.py       diffusers' names of tensors -> those of the original files
components.py    a UNet, a VAE, text encoders, a ControlNet, filled with the tensors of a file
checkpoints.py   whole checkpoints
networks.py      LoRA and its kin: what they change, put into the weights and taken out again
embeddings.py    textual inversion
parts.py         what several checkpoints have in common, in memory once
shelf.py         everything loaded, least recently used goes first
"""
