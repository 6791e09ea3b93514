"""Docker images as one OCI layout, each layer compressed on its own.

Docker loads the layout as it is, without a further program on the machine, and takes of it what it has not.
"""

import contextlib
import hashlib
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import zstandard

from vllm_unified.bundle.archive import BLOCK, Archive
from vllm_unified.errors import UserError

BLOBS = "blobs/sha256/"
# Manifests and configurations; layers are never that small and JSON.
LARGEST_JSON = 8 << 20
# Of each sort of layer the first bytes. What is compressed already stays as it is.
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
LAYER = "application/vnd.oci.image.layer.v1.tar"
# More costs time and saves little: vLLM's layers are libraries.
LEVEL = 3


@dataclass(frozen=True)
class Image:
    """`name`: the one that it gets where it is loaded. `id`: as Docker has it here. `size`: bytes, unpacked."""

    name: str
    id: str
    size: int
    architecture: str


def inspect(image: str, name: str) -> Image:
    """Raises UserError where Docker does not have it."""
    asked = ["docker", "image", "inspect", "--format", "{{.Id}} {{.Size}} {{.Architecture}}", image]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{image}: {done.stderr.strip().splitlines()[-1]}; ./build.sh makes ours, docker pull others")
    image_id, size, architecture = done.stdout.split()
    return Image(name, image_id, int(size), architecture)


@dataclass(frozen=True)
class _Blob:
    """As it is in the bundle; `format`: the suffix of its media type."""

    digest: str
    size: int
    format: str = ""


class Layout:
    """Writes the layout to images/ of the archive. `jobs`: threads. `tick(n)`: n bytes of the image were read.

    `is_there(path, sha256)`: an earlier bundle has this file already.
    """

    def __init__(
        self,
        archive: Archive,
        jobs: int,
        tick: Callable[[int], None],
        is_there: Callable[[str, str], bool],
    ) -> None:
        self.archive = archive
        self.jobs = jobs
        self.tick = tick
        self.is_there = is_there
        self._json: dict[str, bytes] = {}
        self._layers: dict[str, _Blob] = {}

    def save(self, images: Sequence[Image]) -> None:
        """Raises UserError where Docker can't, and OSError."""
        described = [self._saved(image) for image in images]
        index = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest for manifest, _ in described],
        }
        self.archive.add_content("images/index.json", _dumped(index))
        self.archive.add_content("images/manifest.json", _dumped([old for _, old in described]))
        self.archive.add_content("images/oci-layout", _dumped({"imageLayoutVersion": "1.0.0"}))

    def _saved(self, image: Image) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its entries in index.json, and in the manifest.json of before OCI."""
        with _docker_save(image) as stream, tarfile.open(fileobj=stream, mode="r|", bufsize=BLOCK) as tar:
            for entry in tar:
                file = tar.extractfile(entry) if entry.isfile() else None
                if file is not None:
                    self._take(entry, file)
        listed = json.loads(self._json.pop("manifest.json", b"null"))
        if not listed:
            raise UserError("docker save: no manifest.json in what it says; the bundle wants Docker 25 or newer")
        return self._described(image, listed[0])

    def _take(self, entry: tarfile.TarInfo, file: IO[bytes]) -> None:
        first = file.read(min(BLOCK, entry.size))
        self.tick(len(first))
        if first[:1] in (b"{", b"[") and entry.size <= LARGEST_JSON:
            self._json[entry.name] = first + file.read()
            return
        if not entry.name.startswith(BLOBS):
            return  # what Docker adds for versions of long ago

        def content() -> Iterator[bytes]:
            yield first
            while block := file.read(BLOCK):
                self.tick(len(block))
                yield block

        self._layers[entry.name] = self._layer(entry, content(), first)

    def _layer(self, entry: tarfile.TarInfo, content: Iterator[bytes], first: bytes) -> _Blob:
        source = entry.name
        for magic, format in COMPRESSED.items():
            if first.startswith(magic):
                digest = source.removeprefix(BLOBS)
                if not self.is_there(f"images/{source}", digest) and f"images/{source}" not in self.archive.members:
                    self.archive.add(f"images/{source}", entry.size, content, expected=digest)
                return _Blob(digest, entry.size, f"+{format}")
        if member := self.archive.made_of(source):
            return _Blob(member.sha256, member.size, "+zstd")
        return self._compressed(source, entry.size, content)

    def _compressed(self, source: str, size: int, content: Iterator[bytes]) -> _Blob:
        """In a file beside the archive first: its size has to be known before it goes in."""
        scratch = self.archive.parts.place.with_name(f".{self.archive.parts.place.name}.layer")
        try:
            plain = hashlib.sha256()
            compressor = zstandard.ZstdCompressor(level=LEVEL, threads=self.jobs).compressobj(size=size)
            with scratch.open("wb") as file:
                for block in content:
                    plain.update(block)
                    file.write(compressor.compress(block))
                file.write(compressor.flush())
            if plain.hexdigest() != source.removeprefix(BLOBS):
                raise UserError(f"docker save: {source} is not what its name says; the engine's disk may be failing")
            with scratch.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            path, size = f"images/{BLOBS}{digest}", scratch.stat().st_size
            if not self.is_there(path, digest):
                with scratch.open("rb", buffering=0) as file:
                    self.archive.add(path, size, iter(lambda: file.read(BLOCK), b""), expected=digest, made_of=source)
            return _Blob(digest, size, "+zstd")
        finally:
            scratch.unlink(missing_ok=True)

    def _described(self, image: Image, listed: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if listed["Config"] not in self._json or any(path not in self._layers for path in listed["Layers"]):
            raise UserError("docker save: it does not write an OCI layout; the bundle wants Docker 25 or newer")
        config = self._json[listed["Config"]]
        layers = [self._layers[path] for path in listed["Layers"]]
        config_blob = self._add_json(config)
        manifest = self._add_json(
            _dumped(
                {
                    "schemaVersion": 2,
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "config": _descriptor(config_blob, "application/vnd.oci.image.config.v1+json"),
                    "layers": [_descriptor(layer, f"{LAYER}{layer.format}") for layer in layers],
                }
            )
        )
        tag = image.name.rpartition(":")[2]
        names = {"io.containerd.image.name": _full_name(image.name), "org.opencontainers.image.ref.name": tag}
        described = {
            **_descriptor(manifest, "application/vnd.oci.image.manifest.v1+json"),
            "annotations": names,
        }
        old = {
            "Config": f"{BLOBS}{config_blob.digest}",
            "RepoTags": [image.name],
            "Layers": [f"{BLOBS}{layer.digest}" for layer in layers],
        }
        return described, old

    def _add_json(self, content: bytes) -> _Blob:
        digest = hashlib.sha256(content).hexdigest()
        self.archive.add_content(f"images/{BLOBS}{digest}", content)
        return _Blob(digest, len(content))


@contextlib.contextmanager
def _docker_save(image: Image) -> Iterator[IO[bytes]]:
    """What `docker save` writes. Raises UserError where it fails."""
    with subprocess.Popen(
        ["docker", "save", image.id], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as saving:
        stdout, stderr = cast(IO[bytes], saving.stdout), cast(IO[bytes], saving.stderr)
        try:
            yield stdout
        except tarfile.TarError:
            saving.kill()
            raise UserError(f"docker save: {_last_line(stderr)}") from None
        except BaseException:
            saving.kill()
            raise
        while stdout.read(BLOCK):
            pass
        said = _last_line(stderr)
    if saving.returncode:
        raise UserError(f"docker save: {said}")


def _last_line(stderr: IO[bytes]) -> str:
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it broke off"


def _full_name(name: str) -> str:
    """As containerd wants it: Docker leaves out its own registry, and the folder of official images."""
    first, slash, _ = name.partition("/")
    if slash and (first == "localhost" or "." in first or ":" in first):
        return name
    return f"docker.io/{name}" if slash else f"docker.io/library/{name}"


def _descriptor(blob: _Blob, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{blob.digest}", "size": blob.size}


def _dumped(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
