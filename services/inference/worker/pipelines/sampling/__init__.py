"""sampling: from noise to latents, whatever it is that predicts.

  schedules.py   noise levels: what a model was trained with, and what a run steps through
  noise.py       one source of noise per picture, on the CPU
  philox.py      the noise of NVIDIA's GPUs
  samplers.py    the samplers, each a generator that asks for denoised latents
  timesteps.py   those of them that go through training times: DDIM, PLMS, UniPC
  names.py       the webui's sampler names -> sampler, schedule and options

A sampler is a generator: it yields `(x, sigma)`, or these and a training time, is sent the denoised
latents, and returns the last latents. It knows neither models nor prompts, so whoever drives it may
serve several at once.
"""
