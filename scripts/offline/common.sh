# shellcheck shell=bash
# Shared by the scripts of an unpacked bundle. They need what every distribution has, and Docker or Python.

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

no_options() {
  case $* in
    '') ;;
    -h | --help)
      usage
      exit
      ;;
    *) wrong_usage "$*" ;;
  esac
}

profiles_in() { { sed -n 's/^COMPOSE_PROFILES=//p' "$1" 2>/dev/null || true; } | tail -n 1; } # FILE, which may be missing
# The profiles of this bundle go into an .env that names none, so that they can be seen and taken out there.
write_profiles() { # FILE
  local line_end=''
  if [[ -z ${BUNDLE_PROFILES:-} || -n $(profiles_in "$1") ]]; then return; fi
  if [[ -s $1 && -n $(tail -c 1 "$1") ]]; then line_end=$'\n'; fi
  (umask 077 && printf '%sCOMPOSE_PROFILES=%s\n' "$line_end" "$BUNDLE_PROFILES" >>"$1")
}

# ROOT: the unpacked folder. bundle.env says what is in it.
read_about() {
  # shellcheck disable=SC2153
  [[ -f $ROOT/SHA256SUMS && -f $ROOT/SINCE && -f $ROOT/bundle.env ]] ||
    die "$ROOT: no whole bundle; unpack it again, all parts of it and in their order"
  # shellcheck disable=SC1091
  source "$ROOT/bundle.env"
}

decimal() { # BYTES, as 3.2 GB
  awk -v n="$1" 'BEGIN { split("B kB MB GB TB", unit); i = 1; while (n >= 1000 && i < 5) { n /= 1000; i++ } printf(i == 1 ? "%d %s" : "%.1f %s", n, unit[i]) }'
}

# --- checksums ---

# A line each: the SHA-256, two spaces, the path.
paths_in() { cut -c 67- "$@"; } # FILE, or what comes in
# Of all that was bundled, also of what an increment leaves to the bundle that it builds on.
bundled() { cat "$ROOT/SHA256SUMS" "$ROOT/SINCE"; }
is_increment() { [[ -s $ROOT/SINCE ]]; }

# The fastest that is here: OpenSSL uses what the processor has for it.
hash_files() { # FOLDER_FOR_OUTPUT FILE…
  local into=$1
  shift
  if command -v openssl >/dev/null; then
    openssl dgst -sha256 -r "$@" >>"$into/$BASHPID" || true
  else
    sha256sum --binary -- "$@" >>"$into/$BASHPID" || true
  fi
}

temporary() { mktemp "$@" || die "no room for temporary files; set TMPDIR to a folder that has some"; }

# wrong_files SUMS [FOLDER]: a line for each path of which the file is missing, another one, or can't be read. Two processes
# a core, as one computes while the other waits for the disk. What could not be looked at is never taken for right.
wrong_files() (
  sums=$1 folder=${2:-$ROOT}
  scratch=$(temporary -d)
  trap 'kill "$showing" 2>/dev/null; rm -rf "$scratch"' EXIT
  show_progress "$scratch" "$(wc -l <"$sums")" >/dev/null &
  showing=$!
  export -f hash_files
  # Large files first and one at a time, so that all cores have work until the end.
  cd "$folder" || die "$folder: can't be read"
  paths_in "$sums" | tr '\n' '\0' | { xargs -0 -r stat -c '%s %n' 2>/dev/null || true; } | sort -rn >"$scratch/sizes"
  # shellcheck disable=SC2016 # awk's own
  for files in '$1 > 8000000:1' '$1 <= 8000000:50'; do
    awk "${files%:*}" "$scratch/sizes" | cut -d' ' -f2- | tr '\n' '\0' |
      xargs -0 -r -P "$((2 * $(nproc)))" -n "${files#*:}" bash -c 'hash_files "$@"' hash "$scratch" || true
  done
  # shellcheck disable=SC2016 # awk's own
  { sed 's/^/=/' "$scratch"/[0-9]* 2>/dev/null || true; sed 's/^/:/' "$sums"; } | awk '
    { path = substr($0, 68); hash = substr($0, 2, 64) }
    /^=/ { found[path] = hash; next }
    !(path in found) { print "? " path; next }
    found[path] != hash { print "! " path }' |
    while read -r state path; do
      if [[ $state == '!' ]]; then
        say "$path: damaged"
      elif [[ -e $path ]]; then
        say "$path: can't be read"
      else
        say "$path: missing"
      fi
    done
)

show_progress() { # SCRATCH NUMBER_OF_FILES
  # Not with our stderr: whoever reads that would wait for the last sleep.
  while sleep 5 2>/dev/null; do say "  checked $(cat "$1"/[0-9]* 2>/dev/null | wc -l) of $2 files" >&2; done
}

# SHA256SUMS and, of the bundle that an increment builds on, those files that are in this folder too.
all_sums() {
  local line
  cat "$ROOT/SHA256SUMS"
  while IFS= read -r line; do
    if [[ -f $ROOT/${line:66} ]]; then say "$line"; fi
  done <"$ROOT/SINCE"
}

verify() {
  local began=$SECONDS sums wrong bytes
  sums=$(temporary)
  all_sums >"$sums" || die "$sums: can't be written; set TMPDIR to a folder with room"
  wrong=$(wrong_files "$sums") || wrong+=$'\nthe check was broken off'
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

docker_must_answer() {
  timeout 20 docker version >/dev/null 2>&1 || die "the Docker engine does not answer, so nothing was changed: $(docker version 2>&1 | tail -n 1)"
}

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
  elif has_nvidia_gpu; then
    say "the image is for machines without a GPU, and this one has one; bring a bundle of an image made with ./build.sh alone"
  fi
  local root
  root=$(docker info --format '{{.DockerRootDir}}')
  # Docker unpacks the archive before it takes the layers in.
  if [[ -d $root ]] && ! images_are_loaded; then space_problem "$root" $((BUNDLE_IMAGE_BYTES * 3 / 2)); fi
}

space_problem() { # FOLDER BYTES
  local free
  free=$(($(df -Pk "$1" | awk 'NR == 2 { print $4 }') * 1024))
  if ((free < $2)); then say "$1: needs $(decimal "$2"), $(decimal "$free") are free"; fi
}

# Ours, and of other people's those that came along.
# shellcheck disable=SC2086 # names, with spaces between them
names_of_images() { printf '%s\n' "$BUNDLE_IMAGE" ${BUNDLE_COMPANIONS:-}; }
images_are_loaded() {
  local name
  for name in $(names_of_images); do is_loaded "$name" || return; done
}
# Docker calls an image by its configuration, or with containerd's image store by its manifest.
is_loaded() { # IMAGE
  local id
  id=$(docker image inspect --format '{{.Id}}' "$1" 2>/dev/null) || return 1
  grep -qs "${id#sha256:}" "$ROOT/images/index.json" "$ROOT/images/manifest.json"
}

load_images() {
  local names
  names=$(names_of_images | paste -sd ' ')
  if images_are_loaded; then
    say "$names: loaded already"
    return
  fi
  local began=$SECONDS said
  say "loading $names, $(decimal "$BUNDLE_IMAGE_BYTES") unpacked …"
  # Layers that an earlier bundle brought, and that are not in this folder, are in the engine already.
  said=$(all_sums | paths_in | sed -n 's|^images/||p' | sort -u |
    tar --create --directory "$ROOT/images" --verbatim-files-from --files-from - | docker load 2>&1) ||
    die "docker load: $(tail -n 1 <<<"$said"); nothing of a deployment was changed. $(is_increment && say "This is an increment: unpack the bundle that it builds on into the same folder first. ")Run it again when that is mended"
  images_are_loaded || die "docker load said \"$(tail -n 1 <<<"$said")\", but not all of $names are there"
  say "loaded in $((SECONDS - began)) s"
}
