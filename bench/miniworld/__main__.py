"""Command line: `python -m bench.miniworld expand OUT | build | judge | identity | protocol | gallery`."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

from .expand import NARROW_FILE, expand

RESULTS = Path(__file__).parents[1] / "results" / "miniworld"


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
    one = commands.add_parser("judge", help="sample every caption and print what the judge finds")
    one.add_argument("--comfyui", type=Path, help="ComfyUI's folder (or COMFYUI_PATH)")
    one.add_argument("--quick", action="store_true", help="without ComfyUI: this package's own sampler, much faster")
    one.add_argument("--source", type=Path, default=NARROW_FILE, help="the narrow file")
    one.add_argument("--seeds", type=int, default=8)
    one.add_argument("--identifiers", nargs="*", default=[], help="also with these names, such as sks")
    one.add_argument("--out", type=Path, default=Path(__file__).parent, help="where results.json and grid.png go")
    one = commands.add_parser("identity", help="train the identity judge and measure it")
    one.add_argument("--minutes", type=float, default=8)
    one = commands.add_parser("gallery", help="draw what some of the protocol's trainings draw")
    one.add_argument("--out", type=Path, default=RESULTS / "samples.png")
    one = commands.add_parser("protocol", help="run what is missing of the benchmark, then write results and plot")
    one.add_argument("--workers", type=int, help="processes of one thread each; all cores by default")
    one.add_argument("--report", action="store_true", help="run nothing")
    one.add_argument("--out", type=Path, default=RESULTS, help="folder of trials.jsonl, results.json and curves.png")
    return parser


def _protocol(arguments: argparse.Namespace) -> None:
    from .protocol import trials
    from .report import write
    from .trials import missing, run_all

    file = arguments.out / "trials.jsonl"
    if not arguments.report:
        for _ in run_all(trials(), file, arguments.workers):
            pass
    print(write(arguments.out))
    if left := len(missing(trials(), file)):
        print(f"\n{left} trials of the protocol are missing.")


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "expand":
        print(expand(arguments.out, arguments.source))
    elif arguments.command == "build":
        from .build import build

        build(arguments.minutes, arguments.device, arguments.work, arguments.out)
    elif arguments.command == "identity":
        from .identity import make

        make(60 * arguments.minutes)
    elif arguments.command == "gallery":
        from .gallery import draw

        print(draw(arguments.out))
    elif arguments.command == "protocol":
        _protocol(arguments)
    else:
        from .judge import load_judge
        from .measure import Painter, QuickPainter, as_text, measure

        with tempfile.TemporaryDirectory() as folder:
            if arguments.quick:
                paint, name = QuickPainter(arguments.source), "results_quick"
            else:
                checkpoint = expand(Path(folder) / "miniworld_full.safetensors", arguments.source)
                paint, name = Painter(checkpoint, arguments.comfyui), "results"
            identifiers = tuple(dict.fromkeys(("", *arguments.identifiers)))
            results = measure(paint, load_judge(), arguments.seeds, identifiers, arguments.out, name)
        for identifier, scores in results["scores"].items():
            print(f"\nphoto of a {identifier or '-'} ...\n{as_text(scores)}")


if __name__ == "__main__":
    main()
