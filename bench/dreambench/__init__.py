"""DreamBench: the paper's Table 1, cell by cell, through a real ComfyUI. README.md has the protocol and its reasons."""
