#!/bin/sh
# fuzz.sh DURATION: runs every fuzz target of the module for DURATION, one after
# another, and fails at the first find. Finds are left in testdata/fuzz.
set -eu
duration=${1:?usage: fuzz.sh DURATION}
GO=${GO:-go}
count=0
for package in $($GO list ./...); do
	listed=$($GO test -list '^Fuzz' "$package") || { echo "$listed"; exit 1; }
	for target in $(echo "$listed" | grep '^Fuzz' || true); do
		echo "$package $target"
		$GO test -run '^$' -fuzz "^$target\$" -fuzztime "$duration" "$package"
		count=$((count + 1))
	done
done
echo "fuzz: $count targets, $duration each, no find"
