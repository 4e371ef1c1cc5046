"""Speed and memory of training steps, against open_clip's trainer and by part."""
