# shellcheck shell=bash
# What is installed in the folder TO: its releases, and the way from one to another and back.
#
#   TO/current -> releases/VERSION      the program; `previous` the one before
#   TO/config, .env, models, data, run  of the deployment: a release never changes them
#   TO/models/.VERSION                  weights that come with a release, while it is not the current one
#   TO/models/.before-VERSION           those that stood in their places, while it is

# shellcheck disable=SC2034
MARK=.vllm-unified # written first: what is in a folder with it is ours

release_of() { if [[ -L $TO/$1 ]]; then basename "$(readlink "$TO/$1")"; fi; } # current or previous
lock_folder() {
  exec 8<"$TO"
  flock -n 8 || die "$TO: another installation is at work there; wait for it"
}

# Without the lock, which what it starts would hold for as long as it runs.
deploy() { "$TO/deploy.sh" "$@" 8<&-; }

# "--demo" or nothing, as what runs was started; exit code 1 where nothing runs.
running_as() {
  local said
  said=$(deploy status --json 2>/dev/null) || true # it is 3 while a model is not ready
  [[ $said == *'"running": true'* ]] || return 1
  if [[ $said == *'models.demo.json"'* ]]; then say --demo; fi
}

# The release VERSION becomes the current one; what ran is stopped first, and started again. When it does not become
# ready, all is as it was before. Every step can be done twice, so that one that was interrupted is gone on with.
change_release() { # VERSION TIMEOUT
  local version=$1 timeout=$2 old demo start=() running=''
  old=$(release_of current)
  if [[ -n $old ]] && demo=$(running_as); then
    running=yes
    [[ -z $demo ]] || start=("$demo")
    say "stopping $old; requests in flight are finished first"
    deploy stop
  fi
  switch_to "$version"
  [[ -n $running ]] || return 0
  if deploy start "${start[@]}" --timeout "$timeout"; then return; fi
  say "$version did not become ready; going back to $old" >&2
  deploy stop || true
  switch_to "$old"
  deploy start "${start[@]}" --timeout "$timeout" ||
    die "$old does not become ready either; see $TO/deploy.sh logs"
  die "$version did not become ready; $old runs again. $TO/deploy.sh logs says why"
}

switch_to() { # VERSION
  local version=$1 old
  old=$(release_of current)
  [[ $version != "$old" ]] || return 0
  # Back: the weights that came with the release go aside, those that they replaced return.
  if [[ $version == "$(release_of previous)" && -d $TO/models/.before-$old ]]; then
    exchange "$TO/models/.before-$old" "$TO/models/.$old"
  fi
  if [[ -d $TO/models/.$version ]]; then exchange "$TO/models/.$version" "$TO/models/.before-$version"; fi
  point previous "$old"
  point current "$version"
}

# Each folder below NEW takes its place in models/, and what stood there goes below ASIDE.
exchange() { # NEW ASIDE
  local folder place
  while IFS= read -r folder; do
    place=${folder#"$1/"}
    if [[ -e $TO/models/$place && ! -e $2/$place ]]; then
      mkdir -p "$(dirname "$2/$place")"
      mv -T "$TO/models/$place" "$2/$place"
    fi
    mkdir -p "$(dirname "$TO/models/$place")"
    mv -T "$folder" "$TO/models/$place"
  done < <(models_below "$1")
  rm -rf -- "$1"
}

# Those of whole models: the first on each way down that have files of their own.
models_below() { # FOLDER
  [[ -d $1 ]] || return 0
  find "$1" -type f -printf '%h/\n' | LC_ALL=C sort -u | awk 'NR == 1 || index($0, last) != 1 { last = $0; sub("/$", ""); print }'
}

point() { # NAME VERSION
  [[ -n $2 ]] || return 0
  ln -sfn "releases/$2" "$TO/.$1.new"
  mv -T "$TO/.$1.new" "$TO/$1"
}
