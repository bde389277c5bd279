"""The kernels beside a copy of the weight and beside what they replace: python benchmarks/bench_kernels.py [--only GROUP]

`wandapp bench kernels` from a checkout, on one shape of LLaMA-7B where no model or shape is named.
"""

import sys

from wandapp.cli import main

if __name__ == "__main__":
    options = sys.argv[1:]
    names_shapes = "--shape" in options or (options and not options[0].startswith("-"))
    sys.argv = ["wandapp", "bench", "kernels", *options, *([] if names_shapes else ["--shape", "11008x4096"])]
    main()
