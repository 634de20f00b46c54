# The demonstration behind `make demo`: apply, see, ask, undo, redo, on a store of its own.
set -eu
editctl="$BIN/editctl --store $STORE"
rm -rf "$STORE"

bold= dim= plain=
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$(printf '\033[1m') dim=$(printf '\033[2m') plain=$(printf '\033[0m')
fi
title() { printf '\n%s── %s%s\n' "$bold" "$1" "$plain"; }
run() { printf '%s$ editctl %s%s\n' "$dim" "$*" "$plain"; $editctl "$@"; }

title "1. What the specs want, before anything is touched"
run validate specs
run plan specs

title "2. Apply: edit the model's weights, measure before and after"
run apply specs --yes

title "3. Ask the unedited and the edited model"
run ask "Everyone knows that the Eiffel Tower is in"

title "4. The same specs again change nothing"
run apply specs --yes

title "5. Undo is an operation, exact to the last bit"
run undo
run ask "Everyone knows that the Eiffel Tower is in"
run redo
run log

title "6. Everything recorded is whole, and every version comes out of a rebuild to the bit"
run verify

printf '\nThe version is kept in %s. Four things to try next:\n' "$STORE"
printf '  %s                 # the terminal UI (docs/tutorial.md)\n' "$editctl"
printf '  %s show            # every answer, before and after\n' "$editctl"
printf '  %s measure         # rebuild the weights, check their hash, ask everything again\n' "$editctl"
printf '  %s undo            # the unedited model, bit for bit\n' "$editctl"
