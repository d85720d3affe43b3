"""What a worker can do with a job, room by room, without a bus and without S3; and whether it makes
what Stable Diffusion makes.

easel.py        an engine with the demo checkpoint on it, and what tests ask of it
small.py        model files for tests: the demo checkpoint changed, or random weights
tiny.py         tiny random models of every family and form, as files and as diffusers modules
by_hand.py      the same pictures computed without the engine, with plain diffusers and transformers
bench.py        an engine on the CPU, and what it was seen to make

test_bodies.py      params/
test_prompts.py     prompts/
test_sampling.py    sampling/
test_pictures.py    pictures/
test_hints.py       hints.py
test_painting.py    txt2img and img2img from body to picture
test_faces.py       faces.py: found, restored, put back
test_sd_upscale.py  the script "SD upscale"
test_enlarging.py   extra-single-image, extra-batch-images
test_cutting.py     rembg
test_engine.py      jobs side by side
test_families.py    model files of every family and form
test_…fidelity.py   the engine's pictures against plain diffusers
"""
