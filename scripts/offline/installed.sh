# shellcheck shell=bash
# What is installed in the folder TO: its releases, and the way from one to another and back.
#
#   TO/current -> releases/VERSION      the program; `previous` the one before
#   TO/config, .env, models, data, run  of the deployment: a release never changes them
#   TO/models/.VERSION                  weights that come with a release, while it is not the current one
#   TO/models/.before-VERSION           those that stood in their places, while it is
#   TO/.changing                        which two of these folders are being exchanged, while they are
#
# In both folders `.models` lists the models that they are of; MODEL.none stands for one that there is none of, and
# `.release` says which release it leads back to.

# shellcheck disable=SC2034
MARK=.vllm-unified # written first: what is in a folder with it is ours

release_of() { if [[ -L $TO/$1 ]]; then basename "$(readlink "$TO/$1")"; fi; } # current or previous
lock_folder() {
  exec 8<"$TO"
  flock -n 8 || die "$TO: another installation is at work there; wait for it"
}
# Without the lock, which what it starts would hold for as long as it runs.
deploy() { "$TO/deploy.sh" "$@" 8<&-; }
is_in_docker() { grep -qs '^BUNDLE_RUNTIME=docker' "$TO"/releases/*/bundle.env; }

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
  local version=$1 timeout=$2 old previous demo start=() running=''
  old=$(release_of current)
  previous=$(release_of previous)
  if [[ $version == "$old" && ! -e $TO/models/.$version && ! -e $TO/.changing ]]; then return; fi
  if [[ -n $old ]]; then
    if demo=$(running_as); then running=yes; fi
    [[ -z $demo ]] || start=("$demo")
    say "stopping $old; requests in flight are finished first"
    deploy stop # also what hangs, and does not say that it runs
  fi
  switch_to "$version"
  [[ -n $running ]] || return 0
  if deploy start "${start[@]}" --timeout "$timeout"; then return; fi
  [[ $version != "$old" ]] || die "$version does not become ready; see $TO/deploy.sh logs"
  say "$version did not become ready; going back to $old" >&2
  deploy stop || true
  switch_to "$old"
  point previous "$previous"
  deploy start "${start[@]}" --timeout "$timeout" ||
    die "$old does not become ready either; see $TO/deploy.sh logs"
  die "$version did not become ready; $old runs again. $TO/deploy.sh logs says why"
}

switch_to() { # VERSION
  local version=$1 old change
  old=$(release_of current)
  undo_another_change "$version"
  if [[ ! -e $TO/.changing ]]; then
    if [[ $version == "$old" ]]; then
      change=(".$version" .lost) # the same release again brings back weights that were lost
    elif [[ ! -e $TO/models/.$version && $(cat "$TO/models/.before-$old/.release" 2>/dev/null) == "$version" ]]; then
      change=(".before-$old" ".$old")
    else
      change=(".$version" ".before-$version")
    fi
    rm -rf -- "${TO:?}/models/${change[1]}"
    printf '%s\n' "$version" "${change[@]}" >"$TO/.changing.new"
    mv "$TO/.changing.new" "$TO/.changing"
  fi
  mapfile -t change <"$TO/.changing"
  exchange "$TO/models/${change[1]}" "$TO/models/${change[2]}" "$old"
  rm -rf -- "${TO:?}/models/.lost"
  if [[ $version != "$old" ]]; then
    point previous "$old"
    point current "$version"
  fi
  copy_scripts
  rm -f "$TO/.changing"
}

# One that was broken off on the way to another release than is wanted now.
undo_another_change() { # VERSION
  local begun=()
  [[ -e $TO/.changing ]] || return 0
  mapfile -t begun <"$TO/.changing"
  if [[ ${begun[0]} == "$1" ]]; then return; fi
  if [[ ${begun[0]} != "$(release_of current)" ]]; then
    exchange "$TO/models/${begun[2]}" "$TO/models/${begun[1]}" "${begun[0]}"
  fi
  rm -f "$TO/.changing"
}

# Each model below NEW takes its place in models/, and what stood there goes below ASIDE, which leads back to OLD.
exchange() { # NEW ASIDE OLD
  local new=$1 aside=$2 model place
  [[ -e $new/.models ]] || return 0
  mkdir -p "$aside"
  say "$3" >"$aside/.release"
  cp "$new/.models" "$aside/.models"
  while IFS= read -r model; do
    if [[ ! -e $new/$model && ! -L $new/$model && ! -e $new/$model.none ]]; then continue; fi # done before
    place=$TO/models/$model
    mkdir -p "$(dirname "$aside/$model")" "$(dirname "$place")"
    if [[ ! -e $aside/$model && ! -L $aside/$model && ! -e $aside/$model.none ]]; then
      if [[ -e $place || -L $place ]]; then mv -T "$place" "$aside/$model"; else : >"$aside/$model.none"; fi
    fi
    if [[ -e $new/$model || -L $new/$model ]]; then mv -T "$new/$model" "$place"; else rm "$new/$model.none"; fi
  done <"$aside/.models"
  rm -rf -- "$new"
}

# Those that are called by hand, once there is a release that they work on.
copy_scripts() {
  local name
  for name in deploy.sh rollback.sh uninstall.sh; do
    cp "$TO/current/scripts/offline/$name" "$TO/.$name.new"
    chmod 755 "$TO/.$name.new"
    mv "$TO/.$name.new" "$TO/$name"
  done
}

point() { # NAME VERSION
  if [[ -z $2 ]]; then
    rm -f "$TO/$1"
    return
  fi
  ln -sfn "releases/$2" "$TO/.$1.new"
  mv -T "$TO/.$1.new" "$TO/$1"
}
