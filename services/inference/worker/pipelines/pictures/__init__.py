"""pictures: pixels in and out, and what is written down with them.

files.py      base64 of strangers -> pictures; PNG, JPEG, WebP with the `parameters` text
fitting.py    the webui's resize modes
masks.py      masks of inpainting: blur, crop, fill, overlay
grids.py      several pictures as one
previews.py   latents -> a small picture, cheaply
infotext.py   the `parameters` text, and the result's info
"""
