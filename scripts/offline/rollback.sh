#!/usr/bin/env bash
# Back to the release before this one. Calling it again leads forth again.
set -euo pipefail
TO=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=./common.sh
source "$TO/current/scripts/offline/common.sh"
# shellcheck source=./installed.sh
source "$TO/current/scripts/offline/installed.sh"

usage() {
  cat <<'EOF'
usage: ./rollback.sh [--timeout S]

Stops what runs, takes the release and the weights before the last upgrade, and starts that. Configuration, keys and
jobs are those of now. --timeout: seconds that it may take to become ready (default 1800).
EOF
}

timeout=1800
while (($#)); do
  case $1 in
    --timeout)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--timeout wants a number of seconds"
      timeout=$2
      shift
      ;;
    -h | --help)
      usage
      exit
      ;;
    *) wrong_usage "$1" ;;
  esac
  shift
done
if is_in_docker; then docker_must_answer; fi
lock_folder
previous=$(release_of previous)
[[ -n $previous && -d $TO/releases/$previous ]] || die "there is no release before $(release_of current)"
say "from $(release_of current) back to $previous"
change_release "$previous" "$timeout"
say "$previous is the current one"
