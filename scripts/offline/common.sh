# shellcheck shell=bash
# Shared by the scripts of an unpacked bundle. They need bash, coreutils and tar, and Docker or Python, nothing else.

say() { printf '%s\n' "$*"; }
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}
wrong_usage() {
  printf '%s: what is "%s"?\n\n' "${0##*/}" "$1" >&2
  usage >&2
  exit 2
}

# ROOT: the unpacked folder. bundle.env says what is in it.
read_about() {
  # shellcheck disable=SC2153
  [[ -f $ROOT/SHA256SUMS && -f $ROOT/bundle.env ]] ||
    die "$ROOT: no whole bundle; unpack it again, all parts of it and in their order"
  # shellcheck disable=SC1091
  source "$ROOT/bundle.env"
}

decimal() { # BYTES, as 3.2 GB
  awk -v n="$1" 'BEGIN { split("B kB MB GB TB", unit); i = 1; while (n >= 1000 && i < 5) { n /= 1000; i++ } printf(i == 1 ? "%d %s" : "%.1f %s", n, unit[i]) }'
}

# --- checksums ---

# A line each: the SHA-256, two spaces, the path.
paths_in() { cut -c 67- "$1"; } # FILE
# Of all that was bundled, also of what an increment leaves to the bundle that it builds on.
bundled() {
  cat "$ROOT/SHA256SUMS"
  if is_increment; then cat "$ROOT/SINCE"; fi
}
is_increment() { [[ -f $ROOT/SINCE ]]; }
# The fastest that is here: OpenSSL uses what the processor has for it.
hash_files() { # FOLDER_FOR_OUTPUT FILE…
  local into=$1
  shift
  if command -v openssl >/dev/null; then
    openssl dgst -sha256 -r "$@" >"$into/$BASHPID" 2>"$into/$BASHPID.err" || true
  else
    sha256sum --binary -- "$@" >"$into/$BASHPID" 2>"$into/$BASHPID.err" || true
  fi
}

# wrong_files SUMS [FOLDER]: each path of which the file is missing or another one, with what is wrong. All cores read.
wrong_files() {
  local sums=$1 folder=${2:-$ROOT} scratch path
  scratch=$(mktemp -d)
  : >"$scratch/there"
  paths_in "$sums" | while IFS= read -r path; do
    if [[ -f $folder/$path ]]; then printf '%s\n' "$path"; else say "$path: missing" >&3; fi
  done 3>"$scratch/missing" >"$scratch/there"
  mkdir "$scratch/sums"
  export -f hash_files
  # Large files first and one at a time, so that all cores have work until the end.
  (
    cd "$folder" || exit
    tr '\n' '\0' <"$scratch/there" | xargs -0 -r stat -c '%s %n' | sort -rn >"$scratch/sizes"
    awk '$1 > 8000000' "$scratch/sizes" | cut -d' ' -f2- | tr '\n' '\0' |
      xargs -0 -r -P "$(nproc)" -n 1 bash -c 'hash_files "$@"' hash "$scratch/sums"
    awk '$1 <= 8000000' "$scratch/sizes" | cut -d' ' -f2- | tr '\n' '\0' |
      xargs -0 -r -P "$(nproc)" -n 50 bash -c 'hash_files "$@"' hash "$scratch/sums"
  ) &
  local hashing=$! last=$SECONDS
  while kill -0 "$hashing" 2>/dev/null; do
    if ((SECONDS - last >= 5)); then
      last=$SECONDS
      say "  checked $(cat "$scratch"/sums/* 2>/dev/null | wc -l) of $(wc -l <"$sums") files" >&2
    fi
    sleep 0.1
  done
  wait "$hashing" || true
  cat "$scratch/missing"
  LC_ALL=C sort "$sums" >"$scratch/expected"
  cat "$scratch"/sums/* 2>/dev/null | sed 's/^\([0-9a-f]\{64\}\) \*/\1  /' | LC_ALL=C sort >"$scratch/found"
  LC_ALL=C comm -23 "$scratch/expected" "$scratch/found" | cut -c 67- | { grep -Fxf "$scratch/there" || true; } |
    sed 's/$/: damaged/'
  rm -rf "$scratch"
}

# SHA256SUMS and, in an increment, those files of the earlier bundle that are in this folder too.
all_sums() {
  cat "$ROOT/SHA256SUMS"
  if is_increment; then
    local line
    while IFS= read -r line; do
      if [[ -f $ROOT/${line:66} ]]; then say "$line"; fi
    done <"$ROOT/SINCE"
  fi
}

verify() {
  local began=$SECONDS sums wrong bytes
  sums=$(mktemp)
  all_sums >"$sums"
  wrong=$(wrong_files "$sums")
  if [[ -n $wrong ]]; then
    rm -f "$sums"
    head -n 20 <<<"$wrong" >&2
    die "$(wc -l <<<"$wrong") files are not as they were made; bring the bundle again, and compare its parts with their .sha256 first"
  fi
  bytes=$(cd "$ROOT" && paths_in "$sums" | tr '\n' '\0' | xargs -0 -r stat -c %s | awk '{ n += $1 } END { print n + 0 }')
  rm -f "$sums"
  say "the bundle is whole: $(wc -l <"$ROOT/SHA256SUMS") files, $(decimal "$bytes"), read in $((SECONDS - began)) s"
  say "its fingerprint: $(sha256sum "$ROOT/SHA256SUMS" | cut -c 1-64)"
}

# --- Docker ---

readonly OLDEST_DOCKER=23.0 # the first that unpacks layers compressed with zstd
readonly OLDEST_COMPOSE=2.24

is_older() { [[ $1 != "$2" && $(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1) == "$1" ]]; } # VERSION THAN
has_nvidia_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; }

docker_problems() {
  if ! command -v docker >/dev/null; then
    say "docker is not installed; a bundle made with --runtime native does without it"
    return
  fi
  local version compose architecture
  if ! version=$(timeout 20 docker version --format '{{.Server.Version}}' 2>/dev/null); then
    say "the Docker engine does not answer: $(docker version 2>&1 | tail -n 1)"
    return
  fi
  if is_older "$version" "$OLDEST_DOCKER"; then say "Docker is $version, it has to be $OLDEST_DOCKER or newer"; fi
  if ! compose=$(docker compose version --short 2>/dev/null); then
    say "docker has no compose; install the package docker-compose-plugin, $OLDEST_COMPOSE or newer"
  elif is_older "${compose#v}" "$OLDEST_COMPOSE"; then
    say "docker compose is $compose, it has to be $OLDEST_COMPOSE or newer"
  fi
  architecture=$(docker version --format '{{.Server.Arch}}')
  if [[ $architecture != "$BUNDLE_ARCHITECTURE" ]]; then
    say "the image is for $BUNDLE_ARCHITECTURE, this machine is $architecture; bring a bundle that was made for it"
  fi
  if [[ $BUNDLE_DEVICES == gpu ]]; then
    if ! has_nvidia_gpu; then
      say "the image is for NVIDIA GPUs, and nvidia-smi shows none; bring the driver, or a bundle of an image made with ./build.sh --cpu"
    elif ! docker info --format '{{.Runtimes}} {{.CDISpecDirs}}' | grep -q -e nvidia -e cdi; then
      say "Docker has no NVIDIA runtime; install nvidia-container-toolkit, then: nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"
    fi
  fi
  local root
  root=$(docker info --format '{{.DockerRootDir}}')
  # Docker unpacks the archive before it takes the layers in.
  if [[ -d $root ]] && ! image_is_loaded; then space_problem "$root" $((BUNDLE_IMAGE_BYTES * 3 / 2)); fi
}

space_problem() { # FOLDER BYTES
  local free
  free=$(($(df -Pk "$1" | awk 'NR == 2 { print $4 }') * 1024))
  if ((free < $2)); then say "$1: needs $(decimal "$2"), $(decimal "$free") are free"; fi
}

image_is_loaded() {
  local id
  id=$(docker image inspect --format '{{.Id}}' "$BUNDLE_IMAGE" 2>/dev/null) || return 1
  # Docker with containerd's image store calls an image by its manifest, otherwise by its configuration.
  [[ $id == "$BUNDLE_IMAGE_ID" ]] || grep -q "\"digest\":\"$id\"" "$ROOT/images/index.json"
}

load_images() {
  if image_is_loaded; then
    say "$BUNDLE_IMAGE is loaded already"
    return
  fi
  local began=$SECONDS said
  say "loading $BUNDLE_IMAGE, $(decimal "$BUNDLE_IMAGE_BYTES") unpacked …"
  # Layers that an earlier bundle brought, and that are not in this folder, are in the engine already.
  said=$(bundled | cut -c 67- | grep '^images/' | sort -u |
    while IFS= read -r path; do if [[ -f $ROOT/$path ]]; then printf '%s\n' "${path#images/}"; fi; done |
    tar --create --directory "$ROOT/images" --verbatim-files-from --files-from - | docker load 2>&1) ||
    die "docker load: $(tail -n 1 <<<"$said"); nothing was changed. $(is_increment && say "This is an increment: unpack the bundle that it builds on into the same folder first. ")Run it again when that is mended"
  image_is_loaded || die "docker load said \"$(tail -n 1 <<<"$said")\", but $BUNDLE_IMAGE is not there"
  say "loaded in $((SECONDS - began)) s"
}
