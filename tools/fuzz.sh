#!/bin/sh
# fuzz.sh DURATION: runs every fuzz target of the module for DURATION, one after
# another, and fails at the first find. Finds are left in testdata/fuzz.
set -eu
duration=${1:?usage: fuzz.sh DURATION}
GO=${GO:-go}
count=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for package in $($GO list ./...); do
	listed=$($GO test -list '^Fuzz' "$package") || { echo "$listed"; exit 1; }
	for target in $(echo "$listed" | grep '^Fuzz' || true); do
		echo "$package $target"
		if $GO test -run '^$' -fuzz "^$target\$" -fuzztime "$duration" -fuzzminimizetime 1s "$package" >"$log" 2>&1; then
			tail -n 2 "$log"
		elif grep -q '^ *context deadline exceeded$' "$log" && ! grep -q 'Failing input' "$log"; then
			# The time ended while an input was being tried: go test calls that a failure.
			echo "time ended within an input, no find"
		else
			cat "$log"
			exit 1
		fi
		count=$((count + 1))
	done
done
echo "fuzz: $count targets, $duration each, no find"
