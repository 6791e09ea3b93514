#!/usr/bin/env bash
# Start, stop and look after the deployment.
set -euo pipefail
readonly CALLED_FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/lib.sh
source scripts/lib.sh
# shellcheck source=scripts/docker.sh
source scripts/docker.sh

readonly INSTALL_GB=8
readonly IN_CONTAINER=/app

usage() {
  cat <<'EOF'
usage: ./deploy.sh VERB [options]

  start [--demo] [--offline] [--timeout S]
                                  bring every model up and wait until all are ready; fetch the weights that are missing
                                  --demo: four small models that need neither a GPU nor a download of weights
                                  --offline: fetch nothing, and say which weights to bring
                                  --timeout: give up waiting after S seconds (default 1800); the models go on
                                  --docker: in a container, of an image that ./build.sh made or that was loaded
                                  --native: in a virtual environment on this machine
                                  Without either, Docker where it has the image. Nothing is ever pulled
  start MODEL                     one model, after it was stopped
  stop [MODEL]                    end all, or one model; requests in flight are finished first
  restart [MODEL]                 all of it, or one model
  reload [--json]                 take up what changed in the configuration while all goes on, and say what needs a
                                  restart
  status [--json | --watch]       what runs; exit code 0 when all is ready, 3 when not
  logs [NAME…] [--follow] [--lines N] [--errors] [--since WHEN] [--json]
                                  what all wrote last, or a model, router, documents, nginx …, in the order of time
                                  --errors: only these, and requests that failed by no fault of their clients
                                  --since: 30s, 10m, 2h, 3d, or a moment as 2026-11-22T15:00
                                  --lines: the last N (default 50; with --since, all)
                                  In Docker nginx, prometheus and grafana each have a log of their own: logs nginx, with
                                  --follow, --since and --lines alone
  health                          the router's own report; exit code 0 when healthy
  selftest [--json]               golden questions to every model; exit code 1 when one answers wrongly, 3 when it
                                  does not run
  report [FILE] [--hours H]       the charts of the last hours (default 6): a page as FILE.html, a picture as FILE.png; exit
                                  code 3 where no Prometheus runs
  check                           is the configuration right, and can this machine run it?
  plan [--json] [--devices FILE]  which model takes how much of which device, and what does not fit
                                  --devices: plan for the devices in FILE in place of this machine's
  models download|verify|list|import|remove
                                  the weights: fetched, compared with the hub's checksums, brought on a stick, removed;
                                  ./deploy.sh models --help says more
  keys create|list|revoke         API keys beside the deployment's own, with models and limits; ./deploy.sh keys --help
                                  says more
  backup [FILE] [--with-models]   configuration, .env, keys, jobs and usage in one file, which has to be kept secret; with
                                  the weights on request
  restore FILE [--force]          all of that from FILE, in place of what is here; asks first
  update [--timeout S]            Docker: take the image that was built or loaded since; back to the old one when
                                  the new one does not become ready
  clean [--force]                 stop, and remove .venv, run/ and models/demo, or in Docker the container, its images
                                  and cache; configuration, key, jobs and weights stay
  help                            this text

examples:
  ./deploy.sh start --demo        first look, on any machine
  ./deploy.sh start               the models of config/models.json
  ./deploy.sh models verify chat
  ./deploy.sh logs chat --follow
  ./deploy.sh logs --errors --since 2h
  ./deploy.sh restart embedding
  ./deploy.sh reload              after a change of config/models.json
EOF
}

main() {
  local verb=${1:-help}
  shift || true
  case $verb in
    start | stop | restart | reload | status | logs | health | selftest | report | check | plan | models | keys | backup | restore | \
      update | clean)
      find_runtime
      "verb_$verb" "$@"
      ;;
    help | -h | --help) usage ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
}

verb_start() {
  if (($# == 1)) && [[ $1 != -* ]]; then
    start_one "$1"
    return
  fi
  local config=config/models.json timeout=1800 wanted=''
  while (($#)); do
    case $1 in
      --demo) config=config/models.demo.json ;;
      --timeout)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--timeout wants a number of seconds"
        timeout=$2
        shift
        ;;
      --offline) export VLLM_UNIFIED_OFFLINE=1 ;;
      --native | --docker) wanted=${1#--} ;;
      *) wrong_usage "$1" ;;
    esac
    shift
  done
  lock
  if [[ -n $CONTAINER ]] || is_running; then
    [[ -z $wanted || $wanted == "$RUNTIME" ]] || die "already here: $RUNTIME; ./deploy.sh stop ends that first"
  else
    choose_runtime "$wanted"
  fi
  CONFIG=$config
  config=$(config_path "$config")
  # Not with &&, which would switch `set -e` off inside.
  if is_running; then
    already_running "$config" "$timeout"
    return
  fi
  trap 'interrupted' INT TERM
  if [[ $RUNTIME == docker ]]; then
    LAUNCHED=yes
    start_in_docker
  else
    say "Natively, in $VENV"
    start_natively "$config"
  fi
  unlock
  wait_until_ready "$timeout"
  trap - INT TERM
  say
  welcome
}

verb_stop() {
  (($# <= 1)) || wrong_usage "$2"
  if (($# == 0)); then
    stop
    return
  fi
  lock_running
  known_model "$1"
  supervisorctl stop "engines:$1" >/dev/null
  say "stopped $1; ./deploy.sh start $1 starts it again"
}

stop() {
  lock
  if ! is_running && [[ -z $CONTAINER ]]; then
    remove_state
    say "not running"
    return
  fi
  stop_all
  CONTAINER=''
  say "stopped"
}

verb_restart() {
  (($# <= 1)) || wrong_usage "$2"
  if (($# == 0)); then
    must_run
    local config runtime=$RUNTIME
    config=$(running_config)
    cli --config "$config" check --machine
    [[ $runtime != docker ]] || docker_pre_flight
    stop
    if is_demo "$config"; then verb_start --demo "--$runtime"; else verb_start "--$runtime"; fi
    return
  fi
  lock_running
  known_model "$1"
  must_be_enabled "$1"
  say "restarting $1"
  supervisorctl restart "engines:$1" >/dev/null
  # The router goes on with the entry that the engine has now.
  cli reload --restarted "$1"
  cli wait "$1"
}

verb_reload() {
  must_answer
  lock
  cli reload "$@"
  reload_companions
}

verb_status() {
  must_answer
  local states=() # of containers that ours can't see
  if [[ $RUNTIME == docker ]]; then mapfile -t states < <(companion_states); fi
  cli status "${states[@]/#/--container=}" "$@"
}

# Of what does not run any more too, as long as its files are there.
verb_logs() {
  if [[ $RUNTIME == docker && ${1:-} =~ ^(nginx|prometheus|grafana)$ ]]; then
    logs_of_companion "$@"
    return
  elif [[ $RUNTIME == docker && $(container_state) != running ]]; then
    die "the container does not run; docker logs $CONTAINER shows what it wrote"
  elif [[ $RUNTIME == native && ! -x $VENV/bin/vllm-unified ]]; then
    die "$VENV is not there, and reading logs needs it; ./deploy.sh start makes it (the files are in $(home)/run/logs)"
  fi
  cli logs "$@"
}

verb_health() {
  (($# == 0)) || wrong_usage "$1"
  must_answer
  cli health
}

verb_selftest() {
  must_answer
  cli selftest "$@"
}

verb_report() {
  local file=vllm-unified-report.html options=()
  while (($#)); do
    case $1 in
      --hours | --prometheus)
        [[ -n ${2:-} ]] || die "$1 wants a value"
        options+=("$1" "$2")
        shift
        ;;
      -*) wrong_usage "$1" ;;
      *) file=$1 ;;
    esac
    shift
  done
  must_answer
  [[ $RUNTIME != docker ]] || options=(--prometheus http://prometheus:9090 "${options[@]}")
  file=$(cd "$CALLED_FROM" && realpath -- "$file")
  UNFINISHED=$file.part
  trap 'rm -f -- "$UNFINISHED"' EXIT
  cli report --stream --output "$file" "${options[@]}" >"$UNFINISHED"
  mv -- "$UNFINISHED" "$file"
  say "wrote $file"
}

verb_check() {
  (($# == 0)) || wrong_usage "$1"
  find_place
  anywhere check --machine
}

verb_plan() {
  find_place
  if [[ $RUNTIME == docker && " $* " == *" --devices "* ]]; then plan_in_docker "$@"; else anywhere plan "$@"; fi
}

verb_models() {
  find_place
  if [[ $RUNTIME == docker && ${1:-} == import ]]; then import_in_docker "${@:2}"; else anywhere models "$@"; fi
}

verb_keys() {
  find_place
  if [[ $RUNTIME == docker && ${1:-} =~ ^(create|revoke)$ ]]; then change_keys_in_docker "$@"; else anywhere keys "$@"; fi
}

verb_backup() {
  local file='' options=()
  while (($#)); do
    case $1 in
      --with-models) options+=("$1") ;;
      -*) wrong_usage "$1" ;;
      *)
        [[ -z $file ]] || wrong_usage "$1"
        file=$1
        ;;
    esac
    shift
  done
  find_place
  file=$(cd "$CALLED_FROM" && realpath -- "${file:-vllm-unified-backup-$(date -u +%Y%m%d-%H%M%S).tar}")
  [[ ! -e $file ]] || die "$file is there already; name another file"
  UNFINISHED=$file.part
  trap 'rm -f -- "$UNFINISHED"' EXIT
  (umask 077 && in_project backup "${options[@]}" >"$UNFINISHED" </dev/null)
  mv -- "$UNFINISHED" "$file"
  say "$file: $(du -h --apparent-size -- "$file" | cut -f 1); it has the API key in it, keep it secret"
}

verb_restore() {
  local file='' force=''
  while (($#)); do
    case $1 in
      --force) force=yes ;;
      -*) wrong_usage "$1" ;;
      *)
        [[ -z $file ]] || wrong_usage "$1"
        file=$1
        ;;
    esac
    shift
  done
  [[ -n $file ]] || die "restore wants the file that ./deploy.sh backup made"
  file=$(cd "$CALLED_FROM" && realpath -- "$file")
  [[ -f $file && -r $file ]] || die "$file: no file that can be read"
  if is_running || [[ -n $CONTAINER ]]; then die "it runs here; ./deploy.sh stop ends it first"; fi
  if [[ -z $force ]]; then
    say "replaces what is in $(home): configuration, .env, keys, jobs and usage, and the models that $file has"
    confirm restores
  fi
  lock
  find_place
  in_project restore <"$file"
}

# The program where config/ and .env can be written too.
in_project() {
  if [[ $RUNTIME == docker ]]; then
    local RUN_OPTIONS=(--no-TTY "${AS_ROOT[@]}" --volume "$(home):/host")
    in_new_container "$@" --project /host
  else
    install_package >&2
    cli "$@"
  fi
}

# Where nothing runs, where it would. CONFIG: of what runs.
find_place() {
  if is_running; then CONFIG=$(running_config); else choose_runtime ''; fi
}

# For commands that need nothing to run, and take paths.
anywhere() {
  local home config=()
  [[ -z ${CONFIG:-} ]] || config=(--config "$CONFIG")
  home=$(home)
  if [[ $RUNTIME == docker && -n ${CONFIG:-} ]]; then
    cli "${config[@]}" "$@"
  elif [[ $RUNTIME == docker ]]; then
    in_new_container "$@"
  else
    install_package >&2
    (cd "$CALLED_FROM" && VLLM_UNIFIED_HOME=$home cli "${config[@]}" "$@")
  fi
}

verb_update() {
  local timeout=1800
  if [[ ${1:-} == --timeout ]]; then
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--timeout wants a number of seconds"
    timeout=$2
    shift 2
  fi
  (($# == 0)) || wrong_usage "$1"
  [[ $RUNTIME == docker ]] || die "is for Docker; here bring the new source, then: ./deploy.sh restart"
  lock_running
  update_in_docker "$timeout"
}

verb_clean() {
  [[ $# == 0 || ($# == 1 && $1 == --force) ]] || wrong_usage "${2:-$1}"
  local targets=("$VENV" "$(home)/run" "$(home)/models/demo") things=()
  if docker_answers; then mapfile -t things < <(labelled container && labelled volume && labelled image); fi
  say "removes: ${targets[*]} ${things[*]}"
  say "keeps:   configuration, .env, all other models${things:+; the volumes with jobs and models}"
  if [[ ${1:-} != --force ]]; then
    confirm removes
  fi
  lock
  if [[ $RUNTIME == docker ]] || is_running; then stop_all; fi
  if ((${#things[@]})); then clean_docker; fi
  rm -rf -- "${targets[@]}"
  say "removed"
}

# --- in a container, or in .venv ---

# RUNTIME and CONTAINER: of what runs here, or natively where nothing does.
find_runtime() {
  RUNTIME=native CONTAINER=''
  [[ -S $(home)/run/supervisor.sock ]] && return
  CONTAINER=$(container)
  [[ -z $CONTAINER ]] || RUNTIME=docker
}

choose_runtime() { # native, docker, or nothing: as it comes
  if [[ -n $1 ]]; then
    RUNTIME=$1
  elif docker_answers && has_image "$(image)"; then
    RUNTIME=docker
  fi
}

# Where the deployment is.
inside() {
  if [[ $RUNTIME == docker ]]; then
    local terminal=()
    [[ -t 1 ]] && terminal=(--tty)
    [[ -t 0 && -t 1 ]] && terminal+=(--interactive)
    docker exec "${terminal[@]}" "$CONTAINER" "$@"
  else
    "$@"
  fi
}
cli() { if [[ $RUNTIME == docker ]]; then inside vllm-unified "$@"; else "$VENV/bin/vllm-unified" "$@"; fi; }
supervisorctl() {
  local program=$VENV/bin/supervisorctl
  [[ $RUNTIME == docker ]] && program=supervisorctl
  inside "$program" -c "$(run_folder)/supervisord.conf" "$@"
}
run_folder() { if [[ $RUNTIME == docker ]]; then say "$IN_CONTAINER/run"; else say "$(home)/run"; fi; }
# The examples run on the host, where a file in the container has another name.
welcome() {
  if [[ $RUNTIME == docker ]]; then
    local name
    name=$(docker container inspect --format '{{slice .Name 1}}' "$CONTAINER")
    cli welcome | sed "s|base64 -w0 $IN_CONTAINER/|docker exec $name &|
      s|(in $IN_CONTAINER/.env)|(docker exec $name cat data/.env)|
      s|in $IN_CONTAINER/\(data/grafana.password\)|docker exec $name cat \1|"
  else
    cli welcome
  fi
}
# nginx and Prometheus take up what `reload` has rendered; a configuration that they refuse leaves them as they are.
reload_companions() {
  local name
  for name in nginx prometheus; do
    if [[ $RUNTIME == docker ]]; then
      reload_container "$name"
    elif supervisorctl status "$name" >/dev/null; then
      supervisorctl signal HUP "$name" >/dev/null
    fi
  done
}
running_config() { inside cat "$(run_folder)/config"; }
config_path() { if [[ $RUNTIME == docker ]]; then say "$IN_CONTAINER/$1"; else realpath "$(home)/$1"; fi; } # CONFIG

# --- the parts of start, in their order ---

start_natively() { # CONFIG
  pre_flight "$1"
  if ! is_demo "$1"; then cli --config "$1" models download; fi
  if needs_vllm "$1"; then install_vllm; fi
  if is_demo "$1"; then make_demo_models; fi
  cli --config "$1" check --machine >/dev/null
  launch "$1"
}

already_running() { # CONFIG TIMEOUT
  local running report
  running=$(running_config)
  [[ $running == "$1" ]] || die "already running with $running; ./deploy.sh stop ends it first"
  unlock
  if report=$(cli status); then
    say "already running and ready; nothing to do"
    say "$report"
  else
    say "already running; waiting until it is ready"
    wait_until_ready "$2"
  fi
}

start_one() { # MODEL
  lock_running
  known_model "$1"
  must_be_enabled "$1"
  supervisorctl start "engines:$1" >/dev/null
  cli wait "$1"
}

# Everything that can be known before anything large is installed or started.
pre_flight() { # CONFIG
  say "Pre-flight. Nothing is started yet."
  [[ $(uname -s) == Linux ]] || die "runs on Linux; this is $(uname -s)"
  install_package
  local weights=fetching
  is_demo "$1" && weights=making
  if ! cli --config "$1" check --machine --before "$weights"; then
    is_demo "$1" || say "To see it work without a GPU and without weights: ./deploy.sh start --demo" >&2
    exit 1
  fi
  if needs_vllm "$1" && ! is_installed vllm "$(runtime_wanted)"; then
    local free
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    ((free >= INSTALL_GB)) || die "the installation needs $INSTALL_GB GB in $PWD, $free GB are free"
  fi
  cli --config "$1" plan
}

# Not where .env names another program, or all is served elsewhere.
needs_vllm() { # CONFIG
  [[ -z ${VLLM_UNIFIED_ENGINE_PROGRAM:-} ]] && ! grep -qs '^VLLM_UNIFIED_ENGINE_PROGRAM=.' "$(home)/.env" &&
    [[ -n $(cli --config "$1" engines) ]]
}

launch() { # CONFIG
  cli init >/dev/null
  cli --config "$1" render >/dev/null
  LAUNCHED=yes
  # In a session of its own, and without the lock that we hold.
  setsid "$VENV/bin/supervisord" -c "$(home)/run/supervisord.conf" 9>&-
}

wait_until_ready() { # TIMEOUT
  cli wait --timeout "$1" || {
    [[ $? == 130 ]] && interrupted
    say "The models go on trying. ./deploy.sh status, ./deploy.sh logs NAME and ./deploy.sh stop work meanwhile." >&2
    exit 1
  }
}

interrupted() {
  trap '' INT TERM
  say
  [[ -z ${STEP_PID:-} ]] || kill -- "-$STEP_PID" 2>/dev/null || true
  if [[ -n ${LAUNCHED:-} ]]; then
    say "interrupted; stopping what was started"
    stop_all
  elif is_running; then
    say "interrupted; the deployment goes on, ./deploy.sh stop ends it"
    exit 130
  fi
  say "nothing is left running"
  exit 130
}

# --- the running deployment ---

must_run() { is_running || die "not running; start it with ./deploy.sh start"; }
lock_running() {
  must_run
  lock
}
is_running() {
  [[ $RUNTIME == docker || -S $(home)/run/supervisor.sock ]] && supervisorctl pid >/dev/null 2>&1
}

stop_all() {
  if [[ $RUNTIME == docker ]]; then
    compose_down
    return
  fi
  local pid
  pid=$(supervisorctl pid 2>/dev/null) || pid=
  if [[ -n $pid ]]; then
    supervisorctl shutdown >/dev/null || true
    # Where nobody collects it, an ended process stays a zombie.
    while [[ -e /proc/$pid ]] && ! grep -qs '^State:.Z' "/proc/$pid/status"; do sleep 0.2; done
  fi
  remove_state
}

# Only when supervisord is gone. Keepers whose supervisord was killed go on until their requests in flight have ended.
remove_state() {
  local run lock
  run=$(home)/run
  for lock in "$run"/locks/keeper-*.lock; do
    if [[ -e $lock ]] && ! flock -n "$lock" true; then
      say "waiting for $(basename "$lock" .lock) to end"
      flock "$lock" true
    fi
  done
  rm -rf -- "$run/engines" "$run/locks" "$run/rendered" "$run/nginx" "$run/supervisor.sock" "$run/supervisord.pid" \
    "$run/config" "$run/placement.json"
}

# One deploy.sh at a time changes something. The lock is on the folder itself, so none is left behind.
lock() {
  (umask 077 && mkdir -p "$(home)/run")
  exec 9<"$(home)/run"
  flock -n 9 || die "another ./deploy.sh is at work here; wait for it, or end it with Ctrl-C where it runs"
}
unlock() { exec 9<&-; }

# For what the program says of itself; one that is installed and not running says more.
must_answer() {
  if [[ $RUNTIME == docker ]]; then
    [[ $(container_state) == running ]] && return
  elif [[ -x $VENV/bin/vllm-unified ]]; then
    return
  fi
  say "not running; start it with ./deploy.sh start" >&2
  exit 3
}
known_model() { supervisorctl status "engines:$1" >/dev/null || (($? == 3)) || die "no model \"$1\" runs here; see ./deploy.sh status"; }
must_be_enabled() { # MODEL
  local keys
  keys=$(cli --config "$(running_config)" engines)
  [[ $'\n'$keys$'\n' == *$'\n'"$1"$'\n'* ]] || die "\"$1\" is not enabled; enable it in the configuration, and ./deploy.sh reload"
}
confirm() { # removes, restores: what it does
  [[ -t 0 ]] || die "asks before it $1; say --force where nobody can answer"
  local answer
  read -r -p "Go on? [y/N] " answer
  [[ $answer == [yY]* ]] || die "nothing was ${1%s}d"
}
main "$@"
