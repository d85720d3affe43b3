"""prompts: the webui's prompt syntax -> text embeddings.

  syntax.py     (word:1.2) [word] BREAK   [from:to:when] [a|b]   AND   <lora:name:weight>
  encoding.py   chunks of 75 tokens -> embeddings of one or two text encoders, with a cache

What the syntax means is taken from AUTOMATIC1111's webui 1.7, odd corners included.
"""
