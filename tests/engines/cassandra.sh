#!/bin/sh
# A real Apache Cassandra 5 for the tests, from Maven Central.
#   cassandra.sh fetch                                   brings the jars into the cache; prints their directory
#   cassandra.sh run DIR CQL_PORT STORAGE_PORT [IP [TOKEN [SEED_IP]]]
#                                                        becomes the node (exec), with all it writes under DIR
# Whoever starts it asks the node itself whether it is ready, and stops it by its own pid.
set -eu

VERSION=5.0.6
CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/volley/cassandra-$VERSION"

fetch() {
    if [ ! -e "$CACHE/done" ]; then
        command -v java >/dev/null || { echo "no java here" >&2; exit 3; }
        command -v mvn >/dev/null || { echo "no mvn here, and no jars in $CACHE" >&2; exit 3; }
        # Fetched aside and moved, so that two tests at once do not see half of it.
        part="$CACHE.part.$$"
        mkdir -p "$part"
        cat >"$part/pom.xml" <<POM
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>volley</groupId><artifactId>cassandra-of-the-tests</artifactId><version>1</version>
  <dependencies><dependency>
    <groupId>org.apache.cassandra</groupId><artifactId>cassandra-all</artifactId><version>$VERSION</version>
  </dependency></dependencies>
</project>
POM
        mvn -q -B -f "$part/pom.xml" dependency:copy-dependencies -DincludeScope=runtime \
            -DoutputDirectory="$part" >&2 || { rm -rf "$part"; echo "the jars were not fetched" >&2; exit 3; }
        touch "$part/done"
        mv -T "$part" "$CACHE" 2>/dev/null || rm -rf "$part"
    fi
    echo "$CACHE"
}

# Periodic sync acknowledges before the log is safe: a kill may take what the last period acknowledged. A test that counts
# on every acknowledged write asks for COMMITLOG_SYNC=batch.
write_config() {
    commitlog_sync="commitlog_sync: periodic
commitlog_sync_period: 1000ms"
    if [ "${COMMITLOG_SYNC:-}" = batch ]; then commitlog_sync="commitlog_sync: batch"; fi
    cat >"$1/cassandra.yaml" <<YAML
cluster_name: volley-tests
num_tokens: 1
initial_token: "$5"
partitioner: org.apache.cassandra.dht.Murmur3Partitioner
endpoint_snitch: SimpleSnitch
seed_provider:
  - class_name: org.apache.cassandra.locator.SimpleSeedProvider
    parameters: [{seeds: "$6:$3"}]
listen_address: $4
rpc_address: $4
storage_port: $3
native_transport_port: $2
start_native_transport: true
$commitlog_sync
commitlog_segment_size: 8MiB
data_file_directories: ["$1/data"]
commitlog_directory: $1/commitlog
saved_caches_directory: $1/saved_caches
hints_directory: $1/hints
cdc_raw_directory: $1/cdc
auto_bootstrap: false
auto_snapshot: false
hinted_handoff_enabled: false
dynamic_snitch: false
concurrent_reads: 8
concurrent_writes: 8
file_cache_size: 32MiB
memtable_heap_space: 64MiB
memtable_offheap_space: 64MiB
paxos_variant: v2
YAML
    cat >"$1/logback.xml" <<XML
<configuration>
  <appender name="F" class="ch.qos.logback.core.FileAppender"><file>$1/system.log</file>
    <encoder><pattern>%-5level %date{ISO8601} %logger{0} %msg%n</pattern></encoder></appender>
  <root level="INFO"><appender-ref ref="F"/></root>
</configuration>
XML
}

run() {
    lib=$(fetch)
    mkdir -p "$1"
    dir=$(cd "$1" && pwd)
    write_config "$dir" "$2" "$3" "${4:-127.0.0.1}" "${5:-0}" "${6:-${4:-127.0.0.1}}"
    flags=""
    for name in java.base/jdk.internal.misc java.base/java.lang.ref \
        java.management.rmi/com.sun.jmx.remote.internal.rmi java.rmi/sun.rmi.registry \
        java.rmi/sun.rmi.server java.sql/java.sql jdk.unsupported/sun.misc \
        jdk.compiler/com.sun.tools.javac.file jdk.attach/sun.tools.attach; do
        flags="$flags --add-exports $name=ALL-UNNAMED"
    done
    for name in java.lang java.lang.module java.lang.reflect java.io java.util java.nio sun.nio.ch \
        jdk.internal.loader jdk.internal.ref jdk.internal.reflect jdk.internal.math \
        jdk.internal.module jdk.internal.util.jar; do
        flags="$flags --add-opens java.base/$name=ALL-UNNAMED"
    done
    flags="$flags --add-opens jdk.management/com.sun.management.internal=ALL-UNNAMED"
    flags="$flags --add-opens jdk.compiler/com.sun.tools.javac=ALL-UNNAMED"
    # A node that was not reached by a change of the schema asks for it: after a minute by default, which is all the time
    # that a driver waits for nodes to agree.
    # shellcheck disable=SC2086 # The flags are words.
    exec java -javaagent:"$lib/jamm-0.4.0.jar" -Djdk.attach.allowAttachSelf=true $flags \
        -Xms512m -Xmx512m -XX:+UseSerialGC -XX:MaxDirectMemorySize=256m -XX:+ExitOnOutOfMemoryError \
        -Dcassandra.config="file://$dir/cassandra.yaml" \
        -Dlogback.configurationFile="file://$dir/logback.xml" \
        -Dcassandra.storagedir="$dir" -Dcassandra.logdir="$dir/logs" -Dcassandra-foreground=yes \
        -Dcassandra.skip_wait_for_gossip_to_settle=0 -Dcassandra.ring_delay_ms=1 \
        -Dcassandra.migration_delay_ms=1000 -Dcassandra.schema_pull_interval_ms=2000 \
        -Djava.net.preferIPv4Stack=true -Dio.netty.tryReflectionSetAccessible=true \
        -cp "$dir:$lib/*" org.apache.cassandra.service.CassandraDaemon >"$dir/stdout" 2>&1
}

case "${1:-}" in
fetch) fetch ;;
run) shift && run "$@" ;;
*) sed -n '2,6p' "$0" >&2 && exit 2 ;;
esac
