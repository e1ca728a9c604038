"""GGUF for checkpoint-registry: `container` knows the files, `blocks` their Q8_0, and `mappings` what is in them."""
