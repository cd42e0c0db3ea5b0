"""Runs a Python program that ends with the process that started it, however that ended: `python lifeline.py FILE ...`.

A worker that is killed cannot stop the ComfyUI it started, and a cluster would then lose a GPU to it.
"""

import os
import runpy
import sys
import threading
import time
from pathlib import Path


def follow(parent: int) -> None:
    """End this process when its parent is another one than it was. Windows does not tell."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
    runpy.run_path(sys.argv[0], run_name="__main__")
