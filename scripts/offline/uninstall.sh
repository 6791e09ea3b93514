#!/usr/bin/env bash
# Remove the installation: what install.sh brought, and nothing else.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
scripts=$HERE/scripts
[[ -d $scripts ]] || scripts=$HERE/current/scripts/offline
# shellcheck source=./common.sh
source "$scripts/common.sh"
# shellcheck source=./installed.sh
source "$scripts/installed.sh"

usage() {
  cat <<'EOF'
usage: ./uninstall.sh [--to DIR] [--all] [--force]

  --to DIR   the installation (default: the folder of this script, or of a bundle /opt/vllm-unified)
  --all      with configuration, keys, jobs and weights; without it they stay, and another installation takes them up
  --force    ask nothing

Stops what runs, and removes the releases, their images and their scripts. It never touches another container, image or
volume of this machine, nor the unpacked bundle. The images of Nginx, Prometheus and Grafana stay: others may use them.
EOF
}

main() {
  TO=$HERE
  if [[ -e $HERE/SHA256SUMS ]]; then TO=/opt/vllm-unified; fi
  local all='' force=''
  while (($#)); do
    case $1 in
      --to)
        [[ ${2:-} == [!-]* ]] || die "--to wants a folder"
        TO=$(realpath -- "$2")
        shift
        ;;
      --all) all=yes ;;
      --force) force=yes ;;
      -h | --help)
        usage
        return
        ;;
      *) wrong_usage "$1" ;;
    esac
    shift
  done
  [[ -e $TO/$MARK ]] || die "$TO: no installation"
  if is_in_docker; then docker_must_answer; fi
  lock_folder
  local kept="configuration, .env, keys, jobs and weights"
  say "removes: the releases in $TO and their images${all:+, and all $kept}"
  [[ -n $all ]] || say "keeps:   $kept, in $TO"
  if [[ -z $force ]]; then
    [[ -t 0 ]] || die "asks before it removes; say --force where nobody can answer"
    local answer
    read -r -p "Go on? [y/N] " answer
    [[ $answer == [yY]* ]] || die "nothing was removed"
  fi
  remove "$all"
  say "removed"
}

remove() { # ALL
  local release image
  if [[ -e $TO/current ]]; then deploy stop; fi
  for release in "$TO"/releases/*/bundle.env; do
    [[ -e $release ]] || continue
    image=$(sed -n 's/^BUNDLE_IMAGE=//p' "$release")
    if [[ -n $image ]] && docker image rm "$image" >/dev/null 2>&1; then say "removed the image $image"; fi
  done
  remove_volume cache
  remove_volume rendered
  rm -rf -- "$TO/releases" "$TO/current" "$TO/previous" "$TO/.changing" "$TO"/.*.new "$TO"/models/.[!.]* "$TO/run" \
    "$TO/deploy.sh" "$TO/rollback.sh" "$TO/uninstall.sh"
  [[ -n $1 ]] || return 0
  remove_volume data
  remove_volume prometheus
  remove_volume grafana
  rm -rf -- "$TO/config" "$TO/models" "$TO/data" "$TO/.env" "${TO:?}/$MARK"
  rmdir -- "$TO" 2>/dev/null || say "what is left in $TO is not of the installation"
}

# Of this deployment, and only where it carries our label.
remove_volume() { # KIND, as its label says
  local name found
  docker version >/dev/null 2>&1 || return 0
  name=$(sed -n 's/^VLLM_UNIFIED_NAME=//p' "$TO/.env" 2>/dev/null || true)
  found=$(docker volume ls --quiet --filter "label=vllm-unified=$1" --filter "name=^${name:-vllm-unified}_vllm_$1\$")
  if [[ -z $found ]]; then
    return
  elif docker volume rm "$found" >/dev/null; then
    say "removed the volume $found"
  else
    say "the volume $found stays: it is in use"
  fi
}

main "$@"
