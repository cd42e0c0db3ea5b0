"""Command line: `python -m bench.miniworld expand OUT | build | judge`."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

from .expand import NARROW_FILE, expand


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.miniworld", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("expand", help="write the full SD1.5-format checkpoint")
    one.add_argument("out", type=Path)
    one.add_argument("--source", type=Path, default=NARROW_FILE, help="the narrow file")
    one = commands.add_parser("build", help="render, train and pack everything from nothing")
    one.add_argument("--minutes", type=float, default=90, help="wall time of all trainings together")
    one.add_argument("--device", default="auto", help="auto, cpu or cuda")
    one.add_argument("--work", type=Path, default=Path(".work/miniworld/build"), help="scratch folder, resumed from")
    one.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the two weight files go")
    one = commands.add_parser("judge", help="sample every caption with ComfyUI and print what the judge finds")
    one.add_argument("--comfyui", type=Path, help="ComfyUI's folder (or COMFYUI_PATH)")
    one.add_argument("--checkpoint", type=Path, help="a full checkpoint; without it the shipped one is expanded")
    one.add_argument("--seeds", type=int, default=8)
    one.add_argument("--out", type=Path, default=Path(__file__).parent, help="where results.json and grid.png go")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "expand":
        print(expand(arguments.out, arguments.source))
    elif arguments.command == "build":
        from .build import build

        build(arguments.minutes, arguments.device, arguments.work, arguments.out)
    else:
        from .measure import as_text, measure

        with tempfile.TemporaryDirectory() as folder:
            checkpoint = arguments.checkpoint or expand(Path(folder) / "miniworld_full.safetensors")
            results = measure(checkpoint, arguments.comfyui, arguments.seeds, arguments.out)
        for name in ("plain", "with_identifier"):
            print(f"\n{name}\n{as_text(results[name])}")


if __name__ == "__main__":
    main()
