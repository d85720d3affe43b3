"""sampling: from noise to latents, whatever it is that predicts.

  schedules.py   noise levels: what a model was trained with, and what a run steps through
  noise.py       one source of noise per picture, on the CPU
  samplers.py    the samplers, each a generator that asks for denoised latents
  names.py       the webui's sampler names -> sampler, schedule and options

A sampler is a generator: it yields `(x, sigma)`, is sent the denoised latents, and returns the last
latents. It knows neither models nor prompts, so whoever drives it may serve several at once.
"""
