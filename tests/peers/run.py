"""Runs libraries' own tests without and with the fused classes, and compares them test by test::

    python tests/peers/run.py FOLDER [NAME ...]

FOLDER holds checkouts of the libraries, at the versions that are installed, each under its name in `TESTS`;
what is absent is passed over. Nothing is fetched. Prints a table; the exit status is 1 where a test fails
only with the fused classes in place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
TESTS = {
    "pytorch": ["test/distributions"],
    "pyro": [
        *(f"tests/distributions/test_{name}.py" for name in ("distributions", "independent", "kl", "mask")),
        *("tests/distributions/test_pickle.py", "tests/infer/test_elbo_mapdata.py"),
        "tests/contrib/forecast/test_forecaster.py",
    ],
    "pythae": ["tests/test_VAE.py", "tests/test_BetaVAE.py", "tests/test_DisentangledBetaVAE.py"],
    "diffusers": [
        f"tests/models/autoencoders/test_models_{name}.py"
        for name in (
            *("autoencoder_kl", "asymmetric_autoencoder_kl", "autoencoder_kl_temporal_decoder"),
            *("autoencoder_kl_cogvideox", "autoencoder_wan", "autoencoder_ltx_video", "autoencoder_mochi"),
        )
    ],
    "scvi": [
        f"tests/model/test_{name}.py"
        for name in ("scvi", "totalvi", "peakvi", "linear_scvi", "scanvi", "condscvi", "multivi", "destvi")
    ],
    "monai": ["tests/networks/nets/test_autoencoderkl.py", "tests/networks/nets/test_spade_autoencoderkl.py"],
    "multivae": [
        *("tests/test_utils.py", "tests/test_cvae.py", "tests/test_mvtcae.py"),
        *(f"tests/test_{name}_model.py" for name in ("jmvae", "mvae", "mmvae", "telbo")),
    ],
}


def outcomes(name: str, folder: Path, patched: bool) -> dict[str, str]:
    """Of each test "passed", "failed" or "skipped"."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH")])
        ),
        "VAEKERNELS_PATCHED_PEER": name if patched else "",
    }
    tests = [path for path in TESTS[name] if (folder / path).exists()]
    if not tests:
        raise SystemExit(f"{folder} has none of {', '.join(TESTS[name])}; give a checkout of {name}")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "found.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "peers_plugin", f"--junitxml={file}", *tests],
            cwd=folder, env=environment, stdout=sys.stderr, check=False,
        )  # fmt: skip
        if not file.exists():
            raise SystemExit(f"pytest could not run the tests of {name}; see its messages above")
        found = {}
        for case in ElementTree.parse(file).iter("testcase"):
            kinds = {child.tag for child in case}
            failed = kinds & {"failure", "error"}
            outcome = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
            found[f"{case.get('classname')}::{case.get('name')}"] = outcome
        return found


def main(arguments: list[str]) -> int:
    if not arguments:
        raise SystemExit("give the folder with the checkouts, e.g. make test-peers PEERS=folder")
    root, names = Path(arguments[0]).resolve(), arguments[1:] or list(TESTS)
    only_patched: list[str] = []
    print("library     | tests | fail unpatched | fail patched | only patched")
    for name in names:
        if not (root / name).is_dir():
            continue
        plain, ours = (outcomes(name, root / name, patched) for patched in (False, True))
        failed = [{test for test, outcome in each.items() if outcome == "failed"} for each in (plain, ours)]
        worse = sorted((failed[1] - failed[0]) | (plain.keys() - ours.keys()))
        print(f"{name:11} | {len(plain):5} | {len(failed[0]):14} | {len(failed[1]):12} | {len(worse)}")
        only_patched += [f"{name}: {test}" for test in worse]
    for test in only_patched:
        print(test)
    return 1 if only_patched else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
