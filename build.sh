#!/usr/bin/env bash
# Build the image, and try it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/lib.sh
source scripts/lib.sh
# shellcheck source=scripts/docker.sh
source scripts/docker.sh

# What the engine's disk has to hold: our layers, vLLM's images.
readonly OWN_GB=2 GPU_IMAGE_GB=40 CPU_IMAGE_GB=10

usage() {
  cat <<'EOT'
usage: ./build.sh [options]

  --name NAME        of the image (default knowflow/vllm-unified)
  --tag TAG          (default latest)
  --registry HOST    put before the name, as registry.example.com:5000
  --push             push it, when it is built and verified
  --cpu              on vLLM's CPU image, for machines without an NVIDIA GPU
  --with-models      with the weights of config/models.json in the image; HF_TOKEN is read for gated ones, HF_ENDPOINT and
                     MODELSCOPE_ENDPOINT for mirrors
  --skip-models      without weights, which then come from a volume (the default)
  --no-cache         build every layer anew
  --quiet            print errors, and at the end the image's name alone
  --no-verify        do not run the image
  --help             this text

pip's configuration (PIP_CONFIG_FILE, ~/.config/pip/pip.conf or /etc/pip.conf) and the certificates of PIP_CERT or
SSL_CERT_FILE are lent to the build, as secrets that no layer keeps. Images that the profiles in .env (COMPOSE_PROFILES)
want are pulled where they are missing.

Exit codes: 0 built (and verified, and pushed), 1 something is wrong (one line says what), 2 wrong usage.

examples:
  ./build.sh                          for GPUs, as knowflow/vllm-unified:latest
  ./build.sh --cpu --tag cpu
  ./build.sh --tag v1.0.0 --registry registry.example.com:5000 --push
EOT
}

main() {
  local name=knowflow/vllm-unified tag=latest registry=''
  BASE=$GPU_IMAGE BASE_GB=$GPU_IMAGE_GB MODELS=false QUIET='' OPTIONS=()
  local push='' verify=yes
  while (($#)); do
    case $1 in
      --name | --tag | --registry)
        [[ ${2:-} == [!-]* ]] || wrong_usage "$1 without a value"
        local "${1#--}=$2"
        shift
        ;;
      --push) push=yes ;;
      --cpu) BASE=$CPU_IMAGE BASE_GB=$CPU_IMAGE_GB ;;
      --with-models) MODELS=true ;;
      --skip-models) MODELS=false ;;
      --no-cache) OPTIONS+=(--no-cache) ;;
      --quiet) QUIET=yes ;;
      --no-verify) verify='' ;;
      -h | --help)
        usage
        return
        ;;
      *) wrong_usage "$1" ;;
    esac
    shift
  done
  IMAGE=${registry:+$registry/}$name:$tag
  local began=$SECONDS
  pre_flight
  build
  [[ -z $verify ]] || verify
  pull_companions
  [[ -z $push ]] || push
  if [[ -n $QUIET ]]; then say "$IMAGE"; else say "$IMAGE: done in $((SECONDS - began)) s"; fi
}

pre_flight() {
  command -v docker >/dev/null || die "docker is not installed; without it ./deploy.sh start runs natively"
  docker info >/dev/null 2>&1 || die "the Docker engine does not answer: $(docker info 2>&1 | tail -n 1)"
  docker buildx version >/dev/null 2>&1 || die "docker has no buildx; install the package docker-buildx-plugin"
  local needed=$OWN_GB
  if ! docker image inspect "$BASE" >/dev/null 2>&1; then
    tell "$BASE is not here yet; asking its registry"
    timeout 60 docker manifest inspect "$BASE" >/dev/null 2>&1 ||
      die "the base image $BASE is neither here nor to be had; on a machine with internet: docker pull $BASE && docker save $BASE -o base.tar, and here: docker load -i base.tar"
    needed=$BASE_GB
  fi
  must_have_space "$needed"
}

must_have_space() { # GB
  local root free
  root=$(docker info --format '{{.DockerRootDir}}')
  [[ -d $root ]] || return 0 # the engine is on another machine
  free=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')
  ((free >= $1)) || die "the image needs $1 GB in $root, $free GB are free; docker system df shows what can go"
}

build() {
  tell "Building $IMAGE on $BASE"
  local output=/dev/stderr
  [[ -z $QUIET ]] || { OPTIONS+=(--quiet) output=/dev/null; }
  lend_secret pip.conf "${PIP_CONFIG_FILE:-}" ~/.config/pip/pip.conf /etc/pip.conf
  lend_secret ca "${PIP_CERT:-}" "${SSL_CERT_FILE:-}"
  local mirror
  for mirror in HF_ENDPOINT MODELSCOPE_ENDPOINT; do
    [[ -z ${!mirror:-} ]] || OPTIONS+=(--build-arg "$mirror=${!mirror}")
  done
  [[ -z ${HF_TOKEN:-} ]] || OPTIONS+=(--secret "id=hf_token,env=HF_TOKEN")
  DOCKER_BUILDKIT=1 docker build "${OPTIONS[@]}" --tag "$IMAGE" \
    --build-arg "BASE_IMAGE=$BASE" --build-arg "DOWNLOAD_MODELS=$MODELS" \
    --build-arg "VERSION=$(version)" --build-arg "REVISION=$(revision)" --build-arg "SOURCE=$(source_of_origin)" \
    --build-arg "SOURCE_DATE_EPOCH=$(date_of_source)" . >"$output" ||
    die "$IMAGE was not built; what went wrong is said above"
}

lend_secret() { # ID FILE…: the first of the files that there is, as a secret
  local id=$1 file
  shift
  for file in "$@"; do
    if [[ -f $file ]]; then
      OPTIONS+=(--secret "id=$id,src=$file")
      return
    fi
  done
}

version() { sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml; }
revision() { git describe --always --abbrev=40 --dirty --match= 2>/dev/null || true; }
date_of_source() { say "${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}"; }
# No other address than one that everybody may read: it may have a password in it, or be a folder.
source_of_origin() { git remote get-url origin 2>/dev/null | grep -E '^https://[^@]+$' || true; }

verify() {
  tell "Trying it"
  expect "its version" "$(version)" vllm-unified --version
  expect "vLLM's version" "$VLLM_VERSION" python3 -c 'import vllm; print(vllm.__version__)'
  expect "its user" 1000 id --user
  expect "the demonstration's configuration" "nothing wrong" vllm-unified --config config/models.demo.json check
  [[ $(docker image inspect --format '{{index .Config.Labels "vllm-unified"}}' "$IMAGE") == "$(version)" ]] ||
    die "$IMAGE does not carry the label vllm-unified=$(version)"
}

expect() { # WHAT PART COMMAND…: the command's answer in the image has this part
  local what=$1 part=$2 said
  shift 2
  said=$(docker run --rm --network none "$IMAGE" "$@" 2>&1) || die "$IMAGE: $what: $* fails: $(tail -n 3 <<<"$said")"
  [[ $said == *"$part"* ]] || die "$IMAGE: $what: $* says \"$(tail -n 1 <<<"$said")\", not $part"
  tell "  $what: $(tail -n 1 <<<"$said")"
}

# Those of others that the profiles of .env want. A start pulls nothing.
pull_companions() {
  local image images
  docker compose version >/dev/null 2>&1 || return 0 # what is built needs none
  images=$(companion_images) || die "$IMAGE was built; docker-compose.yml and .env do not fit together, the line above says where"
  for image in $images; do pull_missing "$image"; done
}

push() {
  docker push ${QUIET:+--quiet} "$IMAGE" >&2 || die "$IMAGE was built, and not pushed; docker login HOST may be missing"
}

tell() { [[ -n $QUIET ]] || say "$@"; }
main "$@"
