#!/usr/bin/env bash
# Install this bundle on a machine without a network, or take an older installation to it.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=./common.sh
source "$ROOT/scripts/common.sh"
# shellcheck source=./installed.sh
source "$ROOT/scripts/installed.sh"

readonly OWN_BYTES=$((100 * 1000 * 1000)) NATIVE_BYTES=$((8 * 1000 * 1000 * 1000))

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
  for tool in awk comm cut find flock grep nproc realpath sed sha256sum sort stat tar xargs; do
    command -v "$tool" >/dev/null || say "$tool is not installed; it is in every distribution's packages coreutils, findutils, gawk, sed, tar or util-linux"
  done
}

folder_problems() {
  local existing=$TO
  while [[ ! -e $existing ]]; do existing=$(dirname "$existing"); done
  if [[ ! -d $existing || ! -w $existing ]]; then
    say "$existing: $(id -un) may not write there; run it as one who may, or name another folder with --to"
  elif [[ $TO/ == "$ROOT"/* || $ROOT/ == "$TO"/* ]]; then
    say "$TO: the bundle itself is there; name another folder with --to"
  elif [[ -e $TO && ! -e $TO/$MARK && -n $(ls -A "$TO") ]]; then
    say "$TO: holds something else; name another folder with --to, or empty it"
  elif [[ $TO == *[%:$'\n']* ]]; then
    say "$TO: has a letter (%, : or a line's end) that supervisor or Docker can't live with; name another folder with --to"
  fi
  local needed=$OWN_BYTES
  if [[ $BUNDLE_RUNTIME == native ]]; then needed=$((needed + NATIVE_BYTES)); fi
  # On one disk weights are links.
  if [[ $(stat -c %d "$existing") != $(stat -c %d "$ROOT") ]]; then needed=$((needed + BUNDLE_MODEL_BYTES)); fi
  if [[ ! -d $TO/releases/$VERSION ]]; then space_problem "$existing" "$needed"; fi
}

bundle_problems() {
  local path lacking=0 first=
  while IFS= read -r path; do
    if [[ -e $ROOT/$path ]]; then continue; fi
    ((++lacking > 1)) || first=$path
  done < <(paths_in "$ROOT/SHA256SUMS")
  if ((lacking)); then say "$lacking files of the bundle are missing, as $first; unpack it again, all parts of it"; fi
  if is_increment; then
    while IFS= read -r path; do
      if [[ $path == models/* && ! -e $ROOT/$path && ! -e $TO/$path ]]; then
        say "$path: neither here nor in $TO; this is an increment: unpack the bundle that it builds on into the same folder first"
        break
      fi
    done < <(paths_in "$ROOT/SINCE")
  fi
  if is_in_use "$VERSION" && ! is_this_release "$TO/releases/$VERSION"; then
    say "$TO/releases/$VERSION: another release of the same name; make the bundle with a --version of its own"
  fi
  if [[ ! -e $TO/current ]]; then taken_ports; fi
}

taken_ports() {
  local port
  for port in 8000 8001 8002 8003 8004; do
    if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      say "port $port is taken; end what listens there (ss -ltnp shows it). Other ports are named in .env after that, see README.md"
    fi
  done
}

native_problems() {
  local python
  python=$(command -v "python$BUNDLE_PYTHON") || say "python$BUNDLE_PYTHON is not installed; bring it from the installation media of this system"
  if [[ -n $python ]] && ! "$python" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null; then
    say "python$BUNDLE_PYTHON has no headers, which vLLM compiles against; bring the package python$BUNDLE_PYTHON-dev"
  fi
  local architecture
  architecture=$(uname -m | sed 's/^x86_64$/amd64/; s/^aarch64$/arm64/')
  if [[ $architecture != "$BUNDLE_ARCHITECTURE" ]]; then
    say "the bundle is for $BUNDLE_ARCHITECTURE, this machine is $architecture; bring one that was made for it"
  fi
  if [[ $BUNDLE_DEVICES == gpu ]] && ! has_nvidia_gpu; then
    say "the bundle is for NVIDIA GPUs, and nvidia-smi shows none; bring the driver, or a bundle made on a machine without one"
  elif [[ $BUNDLE_DEVICES == cpu ]] && has_nvidia_gpu; then
    say "the bundle is for machines without a GPU; bring one that was made on a machine with one"
  fi
}

say_what_will_be_done() {
  local current
  current=$(release_of current)
  case $current in
    '') say "installs $VERSION" ;;
    "$VERSION") say "$VERSION is installed; what is missing of it is added" ;;
    *) say "takes $current to $VERSION; the way back is $TO/rollback.sh" ;;
  esac
  if [[ -e $TO/config ]]; then say "keeps config/, .env, keys and jobs as they are"; fi
  local folder
  while IFS= read -r folder; do
    if [[ ! -e $TO/models/$folder ]]; then
      say "adds models/$folder"
    elif ! has_weights "$folder"; then
      say "replaces models/$folder, which the way back brings back"
    fi
  done < <(bundled_models)
}

# --- the installation; each step leaves what is there already ---

install() {
  mkdir -p "$TO"
  : >>"$TO/$MARK"
  lock_folder
  umask 022 # the container's user reads the configuration and the weights
  mkdir -p "$TO/releases" "$TO/models"
  if [[ $BUNDLE_RUNTIME == docker ]]; then load_images; fi
  install_release
  stage_models
  if [[ ! -e $TO/config ]]; then
    rm -rf "$TO/.config.new"
    cp -R "$ROOT/release/config" "$TO/.config.new"
    mv -T "$TO/.config.new" "$TO/config"
  fi
  local name
  for name in deploy.sh rollback.sh uninstall.sh; do
    cp "$TO/releases/$VERSION/scripts/offline/$name" "$TO/.$name.new"
    mv "$TO/.$name.new" "$TO/$name"
  done
}

is_in_use() { [[ $1 == "$(release_of current)" || $1 == "$(release_of previous)" ]]; } # VERSION
is_this_release() { cmp -s "$1/SHA256SUMS" "$ROOT/SHA256SUMS"; } # FOLDER

install_release() {
  local place=$TO/releases/$VERSION
  if [[ ! -d $place ]] || ! is_this_release "$place"; then
    rm -rf "$place" "$place.new" "$TO/models/.$VERSION"
    cp -R "$ROOT/release" "$place.new"
    cp "$ROOT/bundle.env" "$ROOT/SHA256SUMS" "$place.new"
    sync -f "$place.new"
    mv -T "$place.new" "$place"
  fi
  [[ $BUNDLE_RUNTIME == docker ]] || install_natively "$place"
}

# Into the release's own .venv, from the wheels that came along.
install_natively() { # RELEASE
  (
    export VLLM_UNIFIED_HOME=$TO VLLM_UNIFIED_WHEELS=$ROOT/wheels
    PYTHON=$(command -v "python$BUNDLE_PYTHON") && export PYTHON
    cd "$1"
    # shellcheck source=/dev/null
    source scripts/lib.sh
    install_package
    install_vllm
  )
}

bundled_models() {
  bundled | cut -c 67- | sed -n 's|^models/\(.*\)/[^/]*$|\1|p' |
    LC_ALL=C sort -u | awk 'NR == 1 || index($0 "/", last) != 1 { last = $0 "/"; print }'
}

model_sums() { bundled | sed -n "\|^[0-9a-f]\{64\}  models/$1/|p"; } # FOLDER

# Whether what is installed is what the bundle has; read only where neither names nor sizes tell.
has_weights() { # FOLDER
  local sums path answer=0
  sums=$(mktemp)
  model_sums "$1" >"$sums"
  while IFS= read -r path; do
    if [[ ! -f $TO/$path || (-f $ROOT/$path && $(stat -c %s "$TO/$path") != $(stat -c %s "$ROOT/$path")) ]]; then
      answer=1
      break
    fi
  done < <(paths_in "$sums")
  if ((answer == 0)) && ! are_one "$sums"; then [[ -z $(wrong_files "$sums" "$TO") ]] || answer=1; fi
  rm -f "$sums"
  return "$answer"
}

# Files that an installation before linked to are the same without reading them.
are_one() { # SUMS
  local path
  while IFS= read -r path; do [[ $TO/$path -ef $ROOT/$path ]] || return 1; done < <(paths_in "$1")
}

# Weights that are new or other than those here go beside them, until the release is the current one. On one disk they
# are links, which take neither time nor room.
stage_models() {
  local folder stage path from
  stage=$TO/models/.$VERSION
  while IFS= read -r folder; do
    if has_weights "$folder"; then continue; fi
    say "taking in models/$folder, $(folder_size "$folder")"
    while IFS= read -r path; do
      from=$ROOT/$path
      [[ -e $from ]] || from=$TO/$path
      mkdir -p "$(dirname "$stage/${path#models/}")"
      cp --archive --force --link "$from" "$stage/${path#models/}" 2>/dev/null ||
        { cp --archive "$from" "$stage/${path#models/}.part" && mv "$stage/${path#models/}.part" "$stage/${path#models/}"; } ||
        die "$TO: the copy of $path failed; make room and run it again, it goes on"
    done < <(model_sums "$folder" | cut -c 67-)
    # The container's user is another one.
    chmod -R a+rX "$stage"
  done < <(bundled_models)
}

folder_size() {
  decimal "$(model_sums "$1" | cut -c 67- | while IFS= read -r path; do stat -c %s "$ROOT/$path" 2>/dev/null || stat -c %s "$TO/$path"; done | awk '{ n += $1 } END { print n + 0 }')"
}

# The current one and the one before stay.
remove_older_releases() {
  local place version image
  for place in "$TO"/releases/*; do
    version=$(basename "$place")
    if is_in_use "$version"; then continue; fi
    image=$(sed -n 's/^BUNDLE_IMAGE=//p' "$place/bundle.env" 2>/dev/null || true)
    if [[ -n $image ]]; then docker image rm "$image" >/dev/null 2>&1 || true; fi
    rm -rf -- "$place" "$TO/models/.before-$version" "$TO/models/.$version"
    say "removed the older release $version"
  done
}

main "$@"
