#!/usr/bin/env bash
# Install this bundle on a machine without a network, or take an older installation to it.
set -euo pipefail
shopt -s extglob
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=./common.sh
source "$ROOT/scripts/common.sh"
# shellcheck source=./installed.sh
source "$ROOT/scripts/installed.sh"

readonly OWN_BYTES=$((100 * 1000 * 1000))

usage() {
  cat <<'EOF'
usage: ./install.sh [options]

  --to DIR         where it goes (default /opt/vllm-unified)
  --dry-run        look at everything and say what would be done; nothing is changed
  --no-verify      do not read the whole bundle first
  --timeout S      of an upgrade: seconds that the new release may take to become ready (default 1800)
  --help           this text

Everything that can be known is known before anything is changed. Where an older release runs in DIR, it is stopped and
the new one started; when that does not become ready, the older one runs again. Configuration, keys, jobs and weights of
the deployment stay. One that was interrupted is run again, and goes on.

Exit codes: 0 installed (or with --dry-run: could be), 1 something is wrong (it is said what, where, and what to do).

examples:
  ./install.sh --dry-run
  ./install.sh && cd /opt/vllm-unified && ./deploy.sh start
  ./install.sh --to /data/vllm-unified
EOF
}

main() {
  TO=/opt/vllm-unified
  local dry_run='' verify=yes timeout=1800
  while (($#)); do
    case $1 in
      --to)
        [[ ${2:-} == [!-]* ]] || die "--to wants a folder"
        TO=$2
        shift
        ;;
      --timeout)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--timeout wants a number of seconds"
        timeout=$2
        shift
        ;;
      --dry-run) dry_run=yes ;;
      --no-verify) verify='' ;;
      -h | --help)
        usage
        return
        ;;
      *) wrong_usage "$1" ;;
    esac
    shift
  done
  read_about
  TO=$(realpath --canonicalize-missing -- "$TO")
  VERSION=$BUNDLE_VERSION
  say "vllm-unified $VERSION ($BUNDLE_RUNTIME) to $TO. Nothing is changed yet."
  pre_flight
  [[ -z $verify ]] || verify
  base_must_be_right
  find_lacking_models
  say_what_will_be_done
  if [[ -n $dry_run ]]; then
    say "nothing was changed"
    return
  fi
  install
  change_release "$VERSION" "$timeout"
  remove_older_releases
  say
  say "installed: $TO"
  running_as >/dev/null || say "start it:  cd $(printf %q "$TO") && ./deploy.sh start"
}

# --- before anything is changed ---

pre_flight() {
  local problems
  problems=$(machine_problems && folder_problems && bundle_problems && if [[ $BUNDLE_RUNTIME == docker ]]; then docker_problems; else native_problems; fi)
  [[ -z $problems ]] || die "nothing was changed, because:
$problems"
}

machine_problems() {
  local tool
  for tool in awk cut find flock nproc realpath sed sha256sum sort stat tar timeout xargs; do
    command -v "$tool" >/dev/null || say "$tool is not installed; it is in every distribution's packages coreutils, findutils, gawk, sed, tar or util-linux"
  done
}

folder_problems() {
  local existing=$TO needed=$OWN_BYTES
  while [[ ! -e $existing ]]; do existing=$(dirname "$existing"); done
  if [[ ! -d $existing || ! -w $existing ]]; then
    say "$existing: $(id -un) may not write there; run it as one who may, or name another folder with --to"
  elif [[ $TO/ == "$ROOT"/* || $ROOT/ == "$TO"/* ]]; then
    say "$TO: the bundle itself is there; name another folder with --to"
  elif [[ -e $TO && ! -e $TO/$MARK && $(ls -A "$TO") != ?(.env) ]]; then
    say "$TO: holds something else; name another folder with --to, or empty it"
  elif [[ $TO == *[%:$'\n']* ]]; then
    say "$TO: has a letter (%, : or a line's end) that supervisor or Docker can't live with; name another folder with --to"
  fi
  if [[ $BUNDLE_RUNTIME == native ]]; then needed=$((needed + BUNDLE_PACKAGE_BYTES)); fi
  if ! takes_links "$existing"; then needed=$((needed + BUNDLE_MODEL_BYTES)); fi
  if [[ ! -d $TO/releases/$VERSION ]]; then space_problem "$existing" "$needed"; fi
}

# Whether weights can be links there, which take no room.
takes_links() { # FOLDER
  local probe=$1/.vllm-unified-probe.$$
  [[ -w $1 ]] && ln "$ROOT/SHA256SUMS" "$probe" 2>/dev/null && rm -f "$probe"
}

bundle_problems() {
  local path lacking=0 first=
  while IFS= read -r path; do
    if [[ -e $ROOT/$path ]]; then continue; fi
    ((++lacking > 1)) || first=$path
  done < <(paths_in "$ROOT/SHA256SUMS")
  if ((lacking)); then say "$lacking of the bundle's files missing, as $first; unpack it again, all parts of it"; fi
  while IFS= read -r path; do
    if [[ $path == images/* || -e $ROOT/$path || ($path == models/* && -e $TO/$path) ]]; then continue; fi
    say "$path: neither here nor in $TO; this is an increment: unpack the bundle that it builds on into the same folder first"
    break
  done < <(paths_in "$ROOT/SINCE")
  if is_in_use "$VERSION" && ! is_this_release "$TO/releases/$VERSION"; then
    say "$TO/releases/$VERSION: another release of the same name; make the bundle with a --version of its own"
  fi
  if [[ ! -e $TO/current ]]; then taken_ports; fi
  if [[ $BUNDLE_RUNTIME == docker ]]; then missing_images; fi
}

# Of the profiles that .env names already: an upgrade starts them too, and a start pulls nothing.
missing_images() {
  local variable image
  for variable in $(images_of_profiles); do
    image=$(sed -n "s/^$variable=//p" "$TO/.env" 2>/dev/null | tail -n 1)
    image=${image:-$(sed -n "s/^$variable=//p" "$ROOT/release/scripts/versions.env")}
    if [[ " ${BUNDLE_COMPANIONS:-} " == *" $image "* ]] || docker image inspect "$image" >/dev/null 2>&1; then continue; fi
    say "the image $image is not here, which COMPOSE_PROFILES in $TO/.env wants; bring a bundle that has it (--with-nginx, --with-monitoring), or docker load -i FILE"
  done
}
images_of_profiles() {
  local profiles
  profiles=$(profiles_in "$TO/.env")
  if [[ ,$profiles, == *,nginx,* ]]; then say NGINX_IMAGE; fi
  if [[ ,$profiles, == *,monitoring,* ]]; then say PROMETHEUS_IMAGE GRAFANA_IMAGE; fi
}

taken_ports() {
  local name port
  for name in ROUTER:8000 CHAT:8001 EMBEDDING:8002 RERANK:8003 OCR:8004 $(ports_of_profiles); do
    port=$(sed -n "s/^VLLM_${name%:*}_PORT=\([0-9]*\)$/\1/p" "$TO/.env" 2>/dev/null | tail -n 1)
    port=${port:-${name#*:}}
    if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      say "port $port is taken; end what listens there (ss -ltnp shows it), or name another in $TO/.env first, as VLLM_${name%:*}_PORT=1$port"
    fi
  done
}

ports_of_profiles() {
  local profiles
  profiles=$(profiles_in "$TO/.env")
  if [[ ! -e $TO/config && -z $profiles ]]; then profiles=$BUNDLE_PROFILES; fi
  if [[ ,$profiles, == *,nginx,* ]]; then say NGINX:80 NGINX_TLS:443; fi
  if [[ ,$profiles, == *,monitoring,* ]]; then say PROMETHEUS:9090 GRAFANA:3000; fi
}

native_problems() {
  local architecture python
  architecture=$(uname -m | sed 's/^x86_64$/amd64/; s/^aarch64$/arm64/')
  if [[ $architecture != "$BUNDLE_ARCHITECTURE" ]]; then
    say "the bundle is for $BUNDLE_ARCHITECTURE, this machine is $architecture; bring one that was made for it"
    return
  fi
  if [[ $BUNDLE_DEVICES == gpu ]] && ! has_nvidia_gpu; then
    say "the bundle is for NVIDIA GPUs, and nvidia-smi shows none; bring the driver, or a bundle made on a machine without one"
  elif [[ $BUNDLE_DEVICES == cpu ]] && has_nvidia_gpu; then
    say "the bundle is for machines without a GPU; bring one that was made on a machine with one"
  fi
  # As many bytes as a Unix socket in run/ may have in its path, and supervisor's process number.
  if (($(LC_ALL=C && printf %s "${#TO}") > 75)); then
    say "$TO: too long a path, 75 bytes at most; name another folder with --to"
  fi
  if [[ $ROOT == *[,$'\n']* ]]; then
    say "$ROOT: has a comma or a line's end, with which Python packages can't be found; unpack the bundle in another folder"
  elif ! python=$(in_release "$ROOT/release" find_python 2>&1); then
    say "${python#*: }"
  else
    python_problems "$python"
  fi
}

# What no wheel brings, and whether these wheels are for this machine.
python_problems() { # PYTHON
  local library scratch said libraries=(libstdc++.so.6:libstdc++6 libz.so.1:zlib1g)
  [[ $BUNDLE_DEVICES == gpu ]] || libraries+=(libnuma.so.1:libnuma1)
  for library in "${libraries[@]}"; do
    "$1" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "${library%:*}" 2>/dev/null ||
      say "the library ${library%:*} is missing; bring it (in Debian and Ubuntu the package ${library#*:}) from the installation media of this system"
  done
  if [[ $BUNDLE_DEVICES == gpu ]]; then missing_to_compile "$1" | sed 's/$/ is missing, and vLLM compiles kernels when it starts; bring it/'; fi
  compgen -G "$ROOT/wheels/uv-*.whl" >/dev/null || return 0 # files are missing, which is said already
  scratch=$(mktemp -d)
  if ! said=$(in_release "$ROOT/release" fits_bundle "$1" "$scratch" 2>&1); then
    say "the Python packages are not for $1: $(sed -n 's/^ *cause: //p' <<<"$said"); bring a bundle that was made on a system like this one"
  fi
  rm -rf "$scratch"
}

# What is missing of what vLLM compiles with: kernels for a GPU at each first start, graphs for CPUs where they are wanted.
missing_to_compile() { # PYTHON
  local compilers=(g++ clang++)
  [[ $BUNDLE_DEVICES == cpu ]] || compilers=(gcc clang)
  command -v "${compilers[@]}" >/dev/null || say "a compiler (in Debian and Ubuntu the package ${compilers[0]})"
  "$1" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
    say "the headers of $1 (in Debian and Ubuntu the package python$BUNDLE_PYTHON-dev)"
}

# COMMAND of the release's scripts/lib.sh, with the packages of this bundle. In a shell of its own, which ends at the
# first error even where this one looks at the exit code.
in_release() ( # RELEASE COMMAND…
  export VLLM_UNIFIED_HOME=$TO VLLM_UNIFIED_WHEELS=$ROOT/wheels BUNDLE_PYTHON BUNDLE_VERSION
  cd "$1"
  exec bash -euo pipefail -c 'source scripts/lib.sh; trap end_step INT TERM; "$@"' "$0" "${@:2}"
)

# An increment takes from the installation what it does not carry.
base_must_be_right() {
  local sums line wrong
  is_increment || return 0
  sums=$(temporary)
  while IFS= read -r line; do
    if [[ ${line:66} == models/* && ! -e $ROOT/${line:66} ]]; then say "$line"; fi
  done <"$ROOT/SINCE" >"$sums"
  wrong=$(wrong_files "$sums" "$TO") || wrong+=$'\nthe check was broken off'
  rm -f "$sums"
  [[ -z $wrong ]] || die "$TO is not what this increment builds on; unpack the bundle that it builds on into the same folder first. Nothing was changed:
$wrong"
}

say_what_will_be_done() {
  local current folder
  current=$(release_of current)
  case $current in
    '') say "installs $VERSION" ;;
    "$VERSION") say "$VERSION is installed; what is missing of it is added" ;;
    *) say "takes $current to $VERSION; the way back is $TO/rollback.sh" ;;
  esac
  if [[ -e $TO/config ]]; then
    say "keeps config/, .env, keys and jobs as they are"
    if [[ -n $BUNDLE_PROFILES && -z $(profiles_in "$TO/.env") ]]; then
      say "brings $BUNDLE_PROFILES; COMPOSE_PROFILES=$BUNDLE_PROFILES in $TO/.env switches that on"
    fi
  elif [[ -n $BUNDLE_PROFILES ]]; then
    say "switches on: $BUNDLE_PROFILES (COMPOSE_PROFILES in $TO/.env)"
  fi
  if [[ $BUNDLE_RUNTIME$BUNDLE_DEVICES == nativecpu ]]; then
    missing_to_compile "$(in_release "$ROOT/release" find_python)" |
      sed 's/^/note: without /; s/$/, each model wants engine_args.enforce-eager: true/'
  fi
  if [[ $BUNDLE_RUNTIME == native ]]; then missing_companions | sed 's/^/note: /'; fi
  for folder in "${LACKING[@]}"; do
    if [[ -e $TO/models/$folder ]]; then
      say "replaces models/$folder, which the way back brings back"
    else
      say "adds models/$folder"
    fi
  done
}

missing_companions() {
  local name
  for name in ${BUNDLE_PROFILES//,/ }; do
    name=${name/monitoring/prometheus}
    PATH=$PATH:/usr/sbin command -v "$name" >/dev/null ||
      say "$name is not installed, and ./deploy.sh start wants it; bring the package $name from this system's media"
  done
}

# --- the installation; each step leaves what is there already ---

install() {
  mkdir -p "$TO"
  : >>"$TO/$MARK"
  lock_folder
  umask 022 # the container's user reads the configuration and the weights
  mkdir -p "$TO/releases" "$TO/models"
  if [[ $BUNDLE_RUNTIME == docker ]]; then
    # The container's user takes in models that are brought later.
    if ((EUID == 0)); then chown 1000:0 "$TO/models"; fi
    load_images
  fi
  install_release
  stage_models
  if [[ ! -e $TO/config ]]; then
    rm -rf "$TO/.config.new"
    cp -R "$ROOT/release/config" "$TO/.config.new"
    chmod -R a+rX "$TO/.config.new"
    mv -T "$TO/.config.new" "$TO/config"
    write_profiles "$TO/.env"
  fi
}

is_in_use() { [[ $1 == "$(release_of current)" || $1 == "$(release_of previous)" ]]; } # VERSION
is_this_release() { [[ $(<"$1/SHA256SUMS") == "$(<"$ROOT/SHA256SUMS")" ]]; }           # FOLDER

install_release() {
  local place=$TO/releases/$VERSION
  if [[ ! -d $place ]] || ! is_this_release "$place"; then
    rm -rf "$place" "$place.new" "$TO/models/.$VERSION"
    mkdir "$place.new"
    # Not what a start in the unpacked folder left there.
    paths_in "$ROOT/SHA256SUMS" | sed -n 's|^release/||p' |
      tar --create --directory "$ROOT/release" --verbatim-files-from --files-from - | tar --extract --directory "$place.new"
    cp "$ROOT/bundle.env" "$ROOT/SHA256SUMS" "$place.new"
    chmod a+x "$place.new/deploy.sh" "$place.new"/scripts/offline/*.sh # a stick may have lost that
    sync -f "$place.new"
    mv -T "$place.new" "$place"
  fi
  [[ $BUNDLE_RUNTIME == docker ]] || install_natively "$place"
}

# Into the release's own .venv, from the wheels that came along.
install_natively() { # RELEASE
  if ! in_release "$1" install_package || ! in_release "$1" install_vllm; then
    rm -rf "$1/.venv"
    die "the packages were not installed, and what there was of them is removed; what runs goes on"
  fi
}

# Folders below models/: the first on each way down that has files of its own.
bundled_models() {
  bundled | paths_in | sed -n 's|^models/\(.*/\)[^/]*$|\1|p' | LC_ALL=C sort -u |
    awk 'NR == 1 || index($0, last) != 1 { last = $0; sub("/$", ""); print }'
}

model_sums() { # FOLDER
  bundled | PREFIX="models/$1/" awk 'index(substr($0, 67), ENVIRON["PREFIX"]) == 1'
}

# LACKING: the models of the bundle that are not here, or not as the bundle has them.
find_lacking_models() {
  local folder
  LACKING=()
  while IFS= read -r folder; do
    if ! has_weights "$folder"; then LACKING+=("$folder"); fi
  done < <(bundled_models)
}

# Read only where neither names nor sizes tell.
has_weights() { # FOLDER
  local sums path answer=0
  sums=$(temporary) || exit
  model_sums "$1" >"$sums" || die "$sums: can't be written; set TMPDIR to a folder with room"
  while IFS= read -r path; do
    if [[ ! -f $TO/$path || (-f $ROOT/$path && $(stat -c %s "$TO/$path") != $(stat -c %s "$ROOT/$path")) ]]; then
      answer=1
      break
    fi
  done < <(paths_in "$sums")
  if ((answer == 0)) && ! are_one "$sums" && [[ -n $(wrong_files "$sums" "$TO" || say broken) ]]; then answer=1; fi
  rm -f "$sums"
  return "$answer"
}

# Files that an installation before linked to are the same without reading them.
are_one() { # SUMS
  local path
  while IFS= read -r path; do [[ $TO/$path -ef $ROOT/$path ]] || return 1; done < <(paths_in "$1")
}

# Weights that are new or other than those here go beside them, until the release is the current one. Where the disk
# can, they are clones or links, which take neither time nor room.
stage_models() {
  local folder stage path
  stage=$TO/models/.$VERSION
  ((${#LACKING[@]})) || return 0
  for folder in "${LACKING[@]}"; do
    say "taking in models/$folder"
    while IFS= read -r path; do
      [[ -e $stage/${path#models/} ]] || stage_file "$path" "$stage/${path#models/}"
    done < <(model_sums "$folder" | paths_in)
  done
  chmod -R a+rX "$stage" # the container's user is another one
  sync -f "$stage"
  printf '%s\n' "${LACKING[@]}" >"$stage/.models.new"
  mv "$stage/.models.new" "$stage/.models"
}

stage_file() { # PATH PLACE: whole, or not at all
  local from=$ROOT/$1
  [[ -e $from ]] || from=$TO/$1
  mkdir -p "$(dirname "$2")"
  rm -f "$2.part"
  cp --archive --reflink=always "$from" "$2.part" 2>/dev/null || { rm -f "$2.part" && ln "$from" "$2.part" 2>/dev/null; } ||
    cp --archive "$from" "$2.part" || die "$TO: the copy of $1 failed; make room and run it again, it goes on"
  mv "$2.part" "$2"
}

# The current one and the one before stay, with the weights of each.
remove_older_releases() {
  local place version image
  for place in "$TO"/releases/*; do
    version=$(basename "$place")
    if is_in_use "$version"; then continue; fi
    image=$(sed -n 's/^BUNDLE_IMAGE=//p' "$place/bundle.env" 2>/dev/null || true)
    if [[ -n $image ]]; then docker image rm "$image" >/dev/null 2>&1 || true; fi
    rm -rf -- "$place"
    say "removed the older release $version"
  done
  for place in "$TO"/models/.[!.]*; do
    version=$(basename "$place")
    if [[ $version == ".before-$(release_of current)" || $version == ".$(release_of previous)" ]]; then continue; fi
    rm -rf -- "$place"
  done
}

main "$@"
