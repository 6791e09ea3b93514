# shellcheck shell=bash
# The deployment in a container: what deploy.sh does with Docker.

readonly OLDEST_COMPOSE=2.24
readonly STARTING_SECONDS=60 # until supervisord of a new container answers

# docker compose reads .env by itself. CONFIG: the file with the models, below the project's folder.
compose() {
  local files=(--file "$PWD/docker-compose.yml")
  has_nvidia_gpu || files+=(--file "$PWD/docker-compose.cpu.yml")
  ! is_demo "${CONFIG:-}" || files+=(--file "$PWD/docker-compose.demo.yml")
  VLLM_UNIFIED_CONFIG=${CONFIG:-config/models.json} VLLM_UNIFIED_RELEASE=$PWD \
    docker compose --project-directory "$(home)" "${files[@]}" "$@"
}
# Whatever profile they came with.
compose_down() { compose --profile nginx --profile monitoring down; }

image() { compose config --images vllm-unified 2>/dev/null; }
# Of the profiles that are wanted.
companion_images() {
  local images
  images=$(compose config --images) || return
  grep -vxF -- "$(image)" <<<"$images" || true
}
project() { compose config --format json | sed -n 's/^  "name": "\(.*\)",$/\1/p'; }
has_image() { docker image inspect "$1" >/dev/null 2>&1; } # IMAGE
docker_answers() { command -v docker >/dev/null && timeout 10 docker info >/dev/null 2>&1; }

# This project's own, whatever its state is, and none of another folder, nor one that a command has for itself.
containers() { # FORMAT
  command -v docker >/dev/null || return 0
  timeout 10 docker ps --all --filter "label=com.docker.compose.project.working_dir=$(home)" \
    --filter label=com.docker.compose.oneoff=False --format "{{.Label \"com.docker.compose.service\"}} $1" 2>/dev/null || true
}
container() { containers '{{.ID}}' | sed -n 's/^vllm-unified //p' | head -n 1; }
companion() { containers '{{.ID}}' | sed -n "s/^$1 //p"; } # nginx, prometheus or grafana: its container, or nothing
# Not `docker kill`, after which Docker takes the container for one that was stopped by hand and does not restart it.
reload_container() { # NAME
  local id state
  read -r id state < <(containers '{{.ID}} {{.State}}' | sed -n "s/^$1 //p") || return 0
  if [[ $state != running ]]; then
    say "$1 does not run ($state), and takes up what has changed when it starts" >&2
  elif ! docker exec "$id" sh -c 'kill -HUP 1'; then
    say "$1 was not told what has changed; docker restart $id does that" >&2
  fi
}
# A line each: its name, = and what Docker knows of its health, as "Up 2 hours (health: starting)" says it.
companion_states() {
  containers '{{.State}} {{.Status}}' | sed -nE '/^vllm-unified /d
    s/^([^ ]+) running .*\((health: )?([a-z]+)\)$/\1=\3/p; t
    s/^([^ ]+) ([a-z]+).*/\1=\2/p'
}
# What they write is Docker's alone.
logs_of_companion() { # NAME [--follow] [--lines N] [--since WHEN]
  local name=$1 id options=() lines='' since=''
  shift
  id=$(companion "$name")
  [[ -n $id ]] || die "$name has no container here; COMPOSE_PROFILES in .env says which ones there are"
  while (($#)); do
    case $1 in
      -f | --follow) options+=(--follow) ;;
      --lines | --since)
        [[ -n ${2:-} ]] || die "$1 wants a value"
        local "${1#--}=$2"
        shift
        ;;
      *) die "$1: not for $name, whose container Docker keeps the log of: --follow, --lines N or --since WHEN" ;;
    esac
    shift
  done
  if [[ $since =~ ^([0-9]+)d$ ]]; then since=$((10#${BASH_REMATCH[1]} * 24))h; fi # Docker knows no days
  if [[ -n $since ]]; then options+=(--since "$since"); else lines=${lines:-50}; fi
  docker logs ${lines:+--tail "$lines"} "${options[@]}" "$id"
}
# Of what others made, on a machine that has a network.
pull_missing() { # IMAGE
  has_image "$1" || docker pull --quiet "$1" >/dev/null ||
    die "the image $1 is neither here nor to be had; on a machine with internet: docker pull $1 && docker save $1 -o image.tar, and here: docker load -i image.tar"
}
container_state() { docker container inspect --format '{{.State.Status}}' "$CONTAINER" 2>/dev/null || say none; }

docker_pre_flight() {
  command -v docker >/dev/null || die "docker is not installed; ./deploy.sh start --native does without it"
  docker_answers || die "the Docker engine does not answer: $(docker info 2>&1 | tail -n 1)"
  local compose_version image
  compose_version=$(docker compose version --short 2>/dev/null) ||
    die "docker has no compose; install the package docker-compose-plugin, $OLDEST_COMPOSE or newer"
  [[ $(printf '%s\n' "$OLDEST_COMPOSE" "${compose_version#v}" | sort --version-sort | head -n 1) == "$OLDEST_COMPOSE" ]] ||
    die "docker compose is $compose_version, it has to be $OLDEST_COMPOSE or newer"
  compose config --quiet || die "docker-compose.yml and .env do not fit together; the line above says where"
  image=$(image)
  has_image "$image" || die "the image $image is not on this machine; make it with ./build.sh, or docker load -i FILE"
  companions_must_be_here
  must_be_for_this_machine "$image"
  if has_nvidia_gpu && ! docker info --format '{{.Runtimes}} {{.CDISpecDirs}}' | grep -q -e nvidia -e cdi; then
    die "Docker has no NVIDIA runtime; install nvidia-container-toolkit, then: nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"
  fi
}

companions_must_be_here() {
  local image images
  images=$(companion_images)
  for image in $images; do
    has_image "$image" ||
      die "the image $image of a profile (COMPOSE_PROFILES) is not on this machine; docker pull $image, or docker load -i FILE"
  done
  # Where it is missing, Docker makes it root's.
  mkdir -p "$(home)/config/tls" 2>/dev/null || true
}

must_be_for_this_machine() { # IMAGE
  local built machine
  built=$(docker image inspect --format '{{.Architecture}}' "$1")
  machine=$(docker version --format '{{.Server.Arch}}')
  [[ $built == "$machine" ]] || die "the image $1 is for $built, this machine is $machine; build or load the right one"
}

start_in_docker() {
  docker_pre_flight
  say "In Docker, of the image $(image)"
  say "Pre-flight. Nothing is started yet."
  if ! { in_new_container check --machine --before fetching && { is_demo "$CONFIG" || in_new_container models download; }; }; then
    compose_down >/dev/null 2>&1 || true
    exit 1
  fi
  if ! compose up --detach; then
    compose_down >/dev/null 2>&1 || true
    die "the container did not start; the line above says why, and nothing is left of it"
  fi
  CONTAINER=$(container)
  wait_for_supervisord
}

wait_for_supervisord() {
  local until=$((SECONDS + STARTING_SECONDS))
  until is_running; do
    if [[ $(container_state) != running ]] || ((SECONDS > until)); then
      docker logs --tail 20 "$CONTAINER" >&2
      die "the container does not come up ($(container_state)); its last lines are above, ./deploy.sh stop removes it"
    fi
    sleep 0.5
  done
}

# The container of the image that has its name now; the one that runs is taken back when that does not become ready.
update_in_docker() { # TIMEOUT
  local old new image
  docker_pre_flight
  image=$(image)
  new=$(docker image inspect --format '{{.Id}}' "$image")
  old=$(docker container inspect --format '{{.Image}}' "$CONTAINER")
  if [[ $new == "$old" ]]; then
    say "runs $image as it is already; build or load a newer one first"
    return
  fi
  has_image "$old" || die "the image that runs now is gone (${old:7:12}), so there would be no way back; ./deploy.sh restart takes the new one"
  CONFIG=$(running_config)
  docker tag "$old" "${image%:*}:previous"
  say "from ${old:7:12} to ${new:7:12}; the way back is ${image%:*}:previous"
  if compose up --detach --force-recreate && CONTAINER=$(container) && (wait_for_supervisord) && cli wait --timeout "$1"; then
    say "updated"
    return
  fi
  say "not ready; going back to ${old:7:12}" >&2
  docker tag "$new" "${image%:*}:failed"
  docker tag "$old" "$image"
  compose up --detach --force-recreate
  CONTAINER=$(container)
  wait_for_supervisord
  cli wait --timeout "$1" || die "the old one does not become ready either; see ./deploy.sh logs"
  die "the new image did not become ready; the old one runs again, the new one is ${image%:*}:failed"
}

# One that is gone when the command has ended, with the same volumes. RUN_OPTIONS: further ones of `docker compose run`.
RUN_OPTIONS=()
in_new_container() {
  compose --progress quiet run --rm --no-deps --env VLLM_UNIFIED_OFFLINE "${RUN_OPTIONS[@]}" vllm-unified vllm-unified "$@"
}
# Root there, to write what is whose ever on the host; of root's rights with these alone.
readonly AS_ROOT=(--user 0:0 --cap-add CHOWN --cap-add DAC_OVERRIDE --cap-add FOWNER)

# What is named is on the host, from where deploy.sh was called: the container reads it below /host.
import_in_docker() {
  local word folder='' words=() RUN_OPTIONS=()
  for word in "$@"; do
    if [[ $word == --move ]]; then
      die "--move is for a native deployment: in Docker the folder is only read; leave it out"
    elif [[ $word != -* && -z $folder ]]; then
      folder=$(path_on_host "$word") || exit
      word=/host$folder
      lend "${folder%/snapshots/*}" # of Hugging Face's cache, which leads to files beside it
    fi
    words+=("$word")
  done
  in_new_container models import "${words[@]}"
}
plan_in_docker() {
  local words=("$@") file at RUN_OPTIONS=()
  for ((at = 1; at < $#; at++)); do
    [[ ${words[at - 1]} == --devices ]] || continue
    file=$(path_on_host "${words[at]}") || exit
    words[at]=/host$file
    lend "$file"
  done
  in_new_container plan "${words[@]}"
}
path_on_host() { (cd "$CALLED_FROM" && realpath -e -- "$1" 2>/dev/null) || die "$1: not there"; }
lend() { RUN_OPTIONS+=(--volume "$1:/host$1:ro"); } # PATH

# The running container only reads config/. The file stays with whoever has the folder, and every user of the image is in
# group 0, which may read it.
change_keys_in_docker() {
  local RUN_OPTIONS=("${AS_ROOT[@]}" --volume "$(home):/host" --workdir /host --env VLLM_UNIFIED_HOME=/host)
  (umask 077 && mkdir -p "$(home)/run")
  # shellcheck disable=SC2016 # is for the shell in the container
  compose --progress quiet run --rm --no-deps "${RUN_OPTIONS[@]}" vllm-unified bash -c '
    set -e
    file=config/keys.yaml
    [[ -e $file ]] || { install --mode 600 /dev/null "$file" && chown --reference config "$file"; }
    chgrp 0 "$file" && chmod g+r "$file"
    exec vllm-unified keys "$@"' keys "$@"
}

# What carries our label: never another container, image or volume of the machine.
labelled() { # KIND: the names of this project's own
  case $1 in
    container) docker ps --all --filter "label=com.docker.compose.project.working_dir=$(home)" --format '{{.Names}}' ;;
    volume)
      docker volume ls --filter "label=com.docker.compose.project=$(project)" \
        --format '{{.Label "vllm-unified"}} {{.Name}}' | sed -nE 's/^(cache|rendered) //p'
      ;;
    image)
      local image
      image=$(image)
      docker image ls --filter label=vllm-unified --filter "reference=${image%:*}" --format '{{.Repository}}:{{.Tag}}'
      ;;
  esac
}

clean_docker() {
  local name
  for name in $(labelled volume); do docker volume rm "$name" >/dev/null && say "removed the volume $name"; done
  for name in $(labelled image); do docker image rm "$name" >/dev/null && say "removed the image $name"; done
}
