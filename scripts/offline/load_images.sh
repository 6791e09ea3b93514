#!/usr/bin/env bash
# Load the bundle's images into Docker. ./install.sh does this too.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=./common.sh
source "$ROOT/scripts/common.sh"

usage() {
  cat <<'EOF'
usage: scripts/load_images.sh

Loads the images into the Docker engine that `docker info` reaches. What is loaded already is left alone.
EOF
}

no_options "$@"
read_about
[[ $BUNDLE_RUNTIME == docker ]] || die "this bundle has no image; ./install.sh installs it without Docker"
problems=$(docker_problems)
[[ -z $problems ]] || die "$problems"
load_images
