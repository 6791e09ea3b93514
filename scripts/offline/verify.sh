#!/usr/bin/env bash
# Is every file of this bundle here, and what it was when the bundle was made?
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=./common.sh
source "$ROOT/scripts/common.sh"

usage() {
  cat <<'EOF'
usage: ./verify.sh

Reads every file and compares it with SHA256SUMS. The fingerprint that it ends with is that of SHA256SUMS itself: the
one who made the bundle can tell you, by another way than the bundle came, whether it is the right one.

Exit codes: 0 whole, 1 something is missing or damaged (each file is named).
EOF
}

no_options "$@"
read_about
verify
