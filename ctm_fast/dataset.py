"""``python -m ctm_fast.dataset``: a data set of any form as an EDM zip, its images cropped or padded to one size."""

import argparse
from pathlib import Path

from ctm_fast import runtime
from ctm_fast.data import CONVERSIONS, TRANSFORMS, repack
from ctm_fast.errors import ConfigError
from ctm_fast.files import check_output


def main() -> None:
    arguments = _parser().parse_args()
    source, destination = arguments.source, arguments.destination
    check_output("DST", destination, ".zip", sources=[Path(source)])
    if Path(source).is_dir() and Path(source).resolve() in destination.resolve().parents:
        raise ConfigError(f"DST: expected a place outside of SRC, got {destination}")
    runtime.prepare(arguments.threads)
    written = repack(
        source,
        destination,
        resolution=arguments.resolution,
        transform=arguments.transform,
        labels=arguments.labels,
        max_images=arguments.max_images,
        conversion=arguments.convert,
        split=arguments.split,
    )
    classes = f"labels of {written.num_classes} classes" if arguments.labels else "no labels"
    print(f"{written.count} images of {arguments.resolution}x{arguments.resolution}, {classes}")
    print(destination)


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.dataset", description=__doc__)
    add = parser.add_argument
    add("source", metavar="SRC", help="whatever --data of ctm_fast.train takes, with images of any sizes")
    add("destination", type=Path, metavar="DST", help="the .zip to write")
    add("--resolution", type=int, required=True, metavar="N", help="height and width of the images written")
    add("--transform", choices=list(TRANSFORMS), default="none", help="what makes them so (default: none, they fit)")
    add(
        "--convert", choices=CONVERSIONS, help="make all images RGB or grey, alpha dropped (default: all must be alike)"
    )
    add("--labels", action=argparse.BooleanOptionalAction, default=True, help="write labels (default: yes)")
    add("--max-images", type=int, metavar="N", help="only the first N (default: all)")
    add("--split", choices=["train", "test"], default="train", help="which images (default: train)")
    add("--threads", type=int, default=runtime.default_threads(), help="CPU threads (default: half of the cores)")
    return parser


if __name__ == "__main__":
    runtime.run(main)
