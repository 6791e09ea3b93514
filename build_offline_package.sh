#!/usr/bin/env bash
# Make the bundle that installs this deployment where no cable goes out.
set -euo pipefail
readonly CALLED_FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/lib.sh
source scripts/lib.sh
# shellcheck source=scripts/docker.sh
source scripts/docker.sh

usage() {
  cat <<'EOF'
usage: ./build_offline_package.sh [options]

  --version NAME            what the bundle is called (default: the project's version)
  --output DIR              where it goes (default dist)
  --models LIST             keys of config/models.json to carry, with commas (default: all that are enabled)
  --skip-models             carry no weights
  --runtime docker|native   the image (the default), or Python packages for hosts without Docker
  --with-nginx              Nginx' image too; where the bundle is first installed, its profile is switched on
  --with-monitoring         the same for Prometheus and Grafana
  --split SIZE              in parts of this size, as 4G, for media that need it
  --since FILE              only what an earlier bundle lacks: FILE is its SHA256SUMS
  --jobs N                  threads (default: all cores)
  --no-verify               do not read the bundle back when it is made
  --help                    this text

Missing weights and images of others are fetched first. Our image is the one that ./build.sh made. Keys and .env are never carried. A run
that was interrupted is run again, and goes on. With --runtime native, Nginx, Prometheus and Grafana are packages of the
host that the bundle is for: bring them from its own media.

Exit codes: 0 made, 1 something is wrong (one line says what), 2 wrong usage.

examples:
  ./build_offline_package.sh --version v1.0.0
  ./build_offline_package.sh --models embedding,rerank --output /media/stick --split 4G
  ./build_offline_package.sh --version v1.1.0 --since dist/knowflow-offline-v1.0.0.SHA256SUMS
  ./build_offline_package.sh --with-nginx --with-monitoring
  ./build_offline_package.sh --runtime native
EOF
}

main() {
  local runtime=docker output=dist options=() models=() skip='' profiles=()
  while (($#)); do
    case $1 in
      --version | --split | --since | --jobs)
        [[ ${2:-} == [!-]* ]] || die "$1 wants a value"
        if [[ $1 == --since ]]; then options+=("$1" "$(path "$2")"); else options+=("$1" "$2"); fi
        shift
        ;;
      --output)
        [[ ${2:-} == [!-]* ]] || die "--output wants a folder"
        output=$(path "$2")
        shift
        ;;
      --models)
        [[ ${2:-} == [!-]* ]] || die "--models wants keys of config/models.json, with commas"
        IFS=', ' read -r -a models <<<"$2"
        options+=(--models "$2")
        shift
        ;;
      --runtime)
        [[ ${2:-} =~ ^(docker|native)$ ]] || die "--runtime wants docker or native"
        runtime=$2
        shift
        ;;
      --with-nginx | --with-monitoring) profiles+=("${1#--with-}") ;;
      --skip-models) skip=--skip-models ;;
      --no-verify) options+=("$1") ;;
      -h | --help)
        usage
        return
        ;;
      *) wrong_usage "$1" ;;
    esac
    shift
  done
  if [[ $runtime == docker ]]; then
    docker_must_have_image
    get_companions "${profiles[@]}"
  fi
  install_package
  install_bundler
  if [[ -n $skip ]]; then options+=("$skip"); else "$VENV/bin/vllm-unified" models download "${models[@]}"; fi
  mkdir -p "$output"
  if [[ $runtime == docker ]]; then
    options+=(--image "$IMAGE" --devices "$(devices_of_image)" "${COMPANIONS[@]/#/--companion=}")
  else
    install_vllm
    make_demo_models
    collect_wheels
    options+=(--wheels "$WHEELHOUSE" --devices "$(devices_of_machine)")
  fi
  "$VENV/bin/vllm-unified" bundle --output "$output" --profiles "$(IFS=,; say "${profiles[*]}")" "${options[@]}"
  if [[ $runtime == native && ${#profiles[@]} != 0 ]]; then
    say "Not in it: ${profiles[*]}, which natively are packages of the host; ./install.sh there says which"
  fi
}

path() { (cd "$CALLED_FROM" && realpath --canonicalize-missing -- "$1"); }

docker_must_have_image() {
  command -v docker >/dev/null || die "docker is not installed; --runtime native makes a bundle without it"
  docker_answers || die "the Docker engine does not answer: $(docker info 2>&1 | tail -n 1)"
  IMAGE=$(image) && [[ -n $IMAGE ]] || die "docker compose can't read docker-compose.yml and .env; \`docker compose config\` says why"
  has_image "$IMAGE" || die "the image $IMAGE is not on this machine; make it with ./build.sh"
}

# COMPANIONS: the images of the profiles.
get_companions() { # PROFILE…
  local profile image
  COMPANIONS=()
  for profile in "$@"; do
    case $profile in
      nginx) COMPANIONS+=("$NGINX_IMAGE") ;;
      monitoring) COMPANIONS+=("$PROMETHEUS_IMAGE" "$GRAFANA_IMAGE") ;;
    esac
  done
  for image in "${COMPANIONS[@]}"; do pull_missing "$image"; done
}

devices_of_image() {
  local base
  base=$(docker image inspect --format '{{index .Config.Labels "org.opencontainers.image.base.name"}}' "$IMAGE")
  if [[ $base == *cpu* ]]; then say cpu; else say gpu; fi
}
devices_of_machine() { if has_nvidia_gpu; then say gpu; else say cpu; fi; }

# Compresses layers; only the one who makes bundles needs it.
install_bundler() {
  local wanted
  wanted=$(cksum <pyproject.toml)
  is_installed bundle "$wanted" && return
  step "Installing what makes bundles" install --editable '.[bundle]'
  mark_installed bundle "$wanted"
}

# Of all that is installed here for vLLM and ourselves, at these versions. They stay for the next bundle.
collect_wheels() {
  WHEELHOUSE=$VENV/.wheels
  local wanted
  wanted=$("$VENV/bin/vllm-unified" requirements)
  [[ ! -f $WHEELHOUSE/requirements.txt || $(<"$WHEELHOUSE/requirements.txt") != "$wanted" ]] || return 0
  rm -rf "$WHEELHOUSE"
  mkdir "$WHEELHOUSE"
  step "Collecting the Python packages" collect_wheels_now "$wanted"
  printf '%s\n' "$wanted" >"$WHEELHOUSE/requirements.txt" # the last: all are here
}
collect_wheels_now() { # REQUIREMENTS
  local torch pip_wheel
  pip_wheel=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input wheel --no-deps --wheel-dir "$WHEELHOUSE")
  torch=$(grep '^torch==.*+cpu' <<<"$1") || torch=
  # An index is asked for each, and answers slowly: several at a time.
  grep -v '^torch==.*+cpu' <<<"$1" | xargs -P 8 -n 10 "${pip_wheel[@]}"
  [[ -z $torch ]] || "${pip_wheel[@]}" "$torch" || "${pip_wheel[@]}" --index-url "$TORCH_CPU_INDEX" "$torch"
}

main "$@"
