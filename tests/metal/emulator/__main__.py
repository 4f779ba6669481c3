"""Command line, run with tests/metal on PYTHONPATH:

python -m emulator build FILE.metal --mode check -o OUT.so      what kv4_metal_module() in CMake calls
python -m emulator check FILE.metal                             translation and the address-space pass alone
"""

from __future__ import annotations

import argparse
import sys

from . import MODES, MetalError, build, check_spaces, load


def main() -> int:
    parser = argparse.ArgumentParser(prog="emulator")
    commands = parser.add_subparsers(dest="command", required=True)
    b = commands.add_parser("build")
    b.add_argument("source")
    b.add_argument("--mode", choices=MODES, default="check")
    b.add_argument("-I", dest="include", action="append", default=[])
    b.add_argument("-D", dest="define", action="append", default=[])
    b.add_argument("-o", dest="output")
    b.add_argument("--only", action="append", default=[], help="an instance of a template; all if none is named")
    c = commands.add_parser("check")
    c.add_argument("source", nargs="+")
    arguments = parser.parse_args()
    try:
        if arguments.command == "build":
            include, define = arguments.include, arguments.define
            print(build(arguments.source, arguments.mode, include, define, arguments.output, arguments.only))
        else:
            from pathlib import Path

            for source in arguments.source:
                _, translation = load(Path(source).resolve())
                if warnings := check_spaces(translation):
                    print(warnings, file=sys.stderr)
    except MetalError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
