# Sleeps and counts by the clock.
n=0
while [ "$n" -lt "$1" ]; do
    sleep 0.1
    n=$((n + 1))
    echo "tick $n"
done >> "$2"
