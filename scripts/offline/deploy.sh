#!/usr/bin/env bash
# ./deploy.sh of the release that is installed here, on the configuration, weights and jobs of this folder.
set -euo pipefail
home=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")" && pwd -P)
# In an unpacked bundle this file is in scripts/, with the release beside that.
if [[ -e $home/current ]]; then
  release=$(realpath "$home/current")
  about=$release/bundle.env
else
  home=${home%/*}
  release=$home/release
  about=$home/bundle.env
fi
# shellcheck disable=SC1090
source "$about"
# shellcheck source=./common.sh
source "$release/scripts/offline/common.sh"
if [[ ! -e $home/config ]]; then
  cp -R "$release/config" "$home/config"
  chmod -R a+rX "$home/config"
  if [[ -d $home/models ]]; then chmod -R a+rX "$home/models"; fi # the container's user reads them
  write_profiles "$home/.env"
fi
export VLLM_UNIFIED_HOME=$home VLLM_UNIFIED_OFFLINE=1
if [[ $BUNDLE_RUNTIME == docker ]]; then
  export VLLM_UNIFIED_IMAGE=$BUNDLE_IMAGE
  grep -qs '^VLLM_UNIFIED_MODELS=' "$home/.env" || export VLLM_UNIFIED_MODELS=./models
else
  # Where they are not beside the release any more, it has them in its .venv.
  export VLLM_UNIFIED_WHEELS=$home/wheels BUNDLE_PYTHON BUNDLE_VERSION
fi
exec "$release/deploy.sh" "$@"
