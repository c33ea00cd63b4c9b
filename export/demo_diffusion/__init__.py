"""A small text-to-image model of our own, from drawn scenes to a folder that diffusers loads. Not part of the wheel."""
