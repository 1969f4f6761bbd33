//! The store of a whole fleet: ScyllaDB or Apache Cassandra, through the scylla driver.
//!
//! ```text
//! capacity_by_host   partition: bucket (4,096 of them), rows: host -> word, said    heartbeats, placers' lookups, scans
//! drains             partition: one,                    rows: host -> deadline, since, message
//! sandbox_by_tenant  partition: tenant and one of 16,     rows: sandbox -> record, with a TTL              lists
//! lease              partition: its name                -> holder, by lightweight transaction with a TTL
//! ```
//! - Rows leave as one prepared UNLOGGED batch a partition: the driver's default is LOGGED, which writes everything twice.
//!   The first statement names the partition, so that the driver sends it straight to a replica (and, with ScyllaDB, to
//!   the core that owns it).
//! - Each row is written `USING TIMESTAMP` of its (seq, revision): the database keeps the newest, whoever writes last, with no
//!   read before the write. A removal carries the timestamp of what it removes, so that a later heartbeat survives it.
//! - Records of sandboxes are written with a TTL, in windows of time that are dropped whole. Of capacity no TTL and no null is written, so that heartbeats leave no tombstones (FAULTS D3).
//! - Nothing is retried here: what failed goes again in its newest state (`heartbeat_core::flush`). An unknown outcome of
//!   the lease is resolved by the next asking, which reads through Paxos.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use heartbeat_core::{
    Drain, Row,
    row::removed,
    shard::{upkeep::Silent, writes::Batch},
};
use scylla::{
    client::{
        execution_profile::ExecutionProfile, session::Session, session_builder::SessionBuilder,
    },
    errors::{DbError, PrepareError, RequestAttemptError},
    policies::retry::FallthroughRetryPolicy,
    statement::{
        Consistency,
        batch::{Batch as CqlBatch, BatchStatement, BatchType},
        prepared::PreparedStatement,
    },
    value::CqlValue,
};
use wire::{CapacityWord, HostId, SandboxId, limits::RECORD_LIVES_MS};

use super::{
    Doing, Store, StoreError,
    listed::Kept,
    place::parse,
    said::{read_row, write_row},
};

/// Parts of a scan: of a million rows each is about 16,000, one second of one node.
const SCAN_PARTS: u32 = 64;
/// Rows of a page of a scan.
const PAGE_ROWS: i32 = 2_000;
/// The driver gives up on a request after this; the caller decides what then.
const REQUEST: Duration = Duration::from_secs(4);
const CONNECT: Duration = Duration::from_secs(5);
/// Partitions of one removal that are on their way at once.
const REMOVALS: usize = 16;
/// There is one fleet a keyspace.
const FLEET: &str = "fleet";
const PUBLISHER: &str = "publisher";

/// See the module.
pub struct ScyllaStore {
    session: Session,
    place: String,
    upsert: PreparedStatement,
    remove: PreparedStatement,
    word: PreparedStatement,
    scan: PreparedStatement,
    lease_take: PreparedStatement,
    lease_renew: PreparedStatement,
    drains: PreparedStatement,
    drain_set: PreparedStatement,
    drain_clear: PreparedStatement,
    sandbox_put: PreparedStatement,
    sandboxes: PreparedStatement,
}

fn away(error: impl std::fmt::Display) -> StoreError {
    StoreError::Away(error.to_string())
}

/// A quorum needs more nodes than there are: said in words of what to do.
fn too_few(error: StoreError) -> StoreError {
    match error {
        StoreError::Away(why) if why.contains("Not enough nodes") => StoreError::Away(format!(
            "{why}. The keyspace keeps more copies of a row than nodes are there to agree on: start them, or alter its \
             replication (a new keyspace: `volley store init --replicas 1`)"
        )),
        other => other,
    }
}

async fn connect(nodes: &[&str]) -> Result<Session, StoreError> {
    let profile = ExecutionProfile::builder()
        .consistency(Consistency::LocalQuorum)
        .request_timeout(Some(REQUEST))
        .retry_policy(Arc::new(FallthroughRetryPolicy::new()))
        .build();
    let builder = SessionBuilder::new()
        .known_nodes(nodes)
        .connection_timeout(CONNECT)
        .default_execution_profile_handle(profile.into_handle());
    match tokio::time::timeout(2 * CONNECT, builder.build()).await {
        Ok(session) => session.map_err(away),
        Err(_) => Err(StoreError::Away(format!("no node of {} answered", nodes.join(", ")))),
    }
}

/// Makes the keyspace and its tables, where they are not there yet.
///
/// # Errors
/// [`StoreError`].
pub async fn init(place: &str, replicas: u32) -> Result<(), StoreError> {
    let (nodes, keyspace) = parse(place)?;
    let session = connect(&nodes).await?;
    let create = format!(
        "CREATE KEYSPACE IF NOT EXISTS {keyspace} WITH replication = \
         {{'class': 'NetworkTopologyStrategy', 'replication_factor': {replicas}}}"
    );
    // ScyllaDB: lightweight transactions want vnodes rather than tablets. Cassandra does not know the word.
    let vnodes = format!("{create} AND tablets = {{'enabled': false}}");
    if session.query_unpaged(vnodes, ()).await.is_err() {
        session.query_unpaged(create, ()).await.map_err(away)?;
    }
    for table in [
        format!(
            "CREATE TABLE IF NOT EXISTS {keyspace}.capacity_by_host (bucket smallint, host bigint, word bigint, \
             said blob, PRIMARY KEY (bucket, host)) \
             WITH compaction = {{'class': 'LeveledCompactionStrategy'}} AND gc_grace_seconds = 86400"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {keyspace}.drains (fleet text, host bigint, deadline_ms bigint, \
             since_ms bigint, message text, PRIMARY KEY (fleet, host))"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {keyspace}.sandbox_by_tenant (tenant text, part smallint, host bigint, \
             local bigint, record blob, PRIMARY KEY ((tenant, part), host, local)) \
             WITH compaction = {{'class': 'TimeWindowCompactionStrategy', 'compaction_window_unit': 'MINUTES', \
             'compaction_window_size': 5}} AND gc_grace_seconds = 3600"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {keyspace}.lease (name text PRIMARY KEY, holder bigint)"
        ),
    ] {
        session.query_unpaged(table, ()).await.map_err(away)?;
    }
    session.await_schema_agreement().await.map_err(away)?;
    Ok(())
}

impl ScyllaStore {
    /// Opens `host:port[,host:port]/keyspace`, whose tables [`init`] has made.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn open(place: &str) -> Result<Self, StoreError> {
        let (nodes, keyspace) = parse(place)?;
        let session = connect(&nodes).await?;
        let prepare = async |text: &str| {
            let text = text.replace("KS.", &format!("{keyspace}."));
            let mut prepared =
                session.prepare(text).await.map_err(|error| missing(place, &error))?;
            // All of them may be sent twice: timestamps, conditions and keys make it the same.
            prepared.set_is_idempotent(true);
            Ok::<_, StoreError>(prepared)
        };
        let mut scan = prepare(
            "SELECT host, said FROM KS.capacity_by_host WHERE token(bucket) > ? AND token(bucket) <= ?",
        )
        .await?;
        scan.set_page_size(PAGE_ROWS);
        let mut word =
            prepare("SELECT word FROM KS.capacity_by_host WHERE bucket = ? AND host = ?").await?;
        // The host decides admission: a word may be a little old, and must be quick.
        word.set_consistency(Consistency::LocalOne);
        Ok(Self {
            upsert: prepare(
                "INSERT INTO KS.capacity_by_host (bucket, host, word, said) VALUES (?, ?, ?, ?) \
                 USING TIMESTAMP ?",
            )
            .await?,
            remove: prepare(
                "DELETE FROM KS.capacity_by_host USING TIMESTAMP ? WHERE bucket = ? AND host = ?",
            )
            .await?,
            word,
            scan,
            lease_take: prepare(
                "INSERT INTO KS.lease (name, holder) VALUES (?, ?) IF NOT EXISTS USING TTL ?",
            )
            .await?,
            lease_renew: prepare(
                "UPDATE KS.lease USING TTL ? SET holder = ? WHERE name = ? IF holder = ?",
            )
            .await?,
            drains: prepare(
                "SELECT host, deadline_ms, since_ms, message FROM KS.drains WHERE fleet = ?",
            )
            .await?,
            drain_set: prepare(
                "INSERT INTO KS.drains (fleet, host, deadline_ms, since_ms, message) VALUES (?, ?, ?, ?, ?)",
            )
            .await?,
            drain_clear: prepare("DELETE FROM KS.drains WHERE fleet = ? AND host = ?").await?,
            sandbox_put: prepare(
                "INSERT INTO KS.sandbox_by_tenant (tenant, part, host, local, record) \
                 VALUES (?, ?, ?, ?, ?) USING TIMESTAMP ? AND TTL ?",
            )
            .await?,
            sandboxes: prepare(
                "SELECT host, local, record FROM KS.sandbox_by_tenant WHERE tenant = ? AND part = ? LIMIT ?",
            )
            .await?,
            session,
            place: place.to_owned(),
        })
    }

    /// Writes one row by itself: what batches are measured against.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn upsert_one(&self, row: &Row) -> Result<(), StoreError> {
        let done = self.session.execute_unpaged(&self.upsert, row_values(row)).await;
        done.map(drop).map_err(away)
    }

    async fn remove_partition(&self, part: Vec<Silent>) -> Result<(), StoreError> {
        let values: Vec<_> = part
            .iter()
            .map(|silent| (removed(silent.seq), bucket(silent.host), signed(silent.host.0)))
            .collect();
        let statements = unlogged(&self.remove, values.len());
        self.session.batch(&statements, values).await.map(drop).map_err(away)
    }

    async fn word_of(&self, host: HostId) -> Result<Option<CapacityWord>, StoreError> {
        let key = (bucket(host), signed(host.0));
        let got = self.session.execute_unpaged(&self.word, key).await.map_err(away)?;
        let rows = got.into_rows_result().map_err(away)?;
        let word = rows.maybe_first_row::<(i64,)>().map_err(away)?;
        Ok(word.map(|(word,)| CapacityWord(unsigned(word))))
    }

    async fn conditional(
        &self,
        statement: &PreparedStatement,
        values: impl scylla::serialize::row::SerializeRow,
    ) -> Result<(bool, Option<i64>), StoreError> {
        let got = self.session.execute_unpaged(statement, values).await.map_err(away)?;
        let rows = got.into_rows_result().map_err(away)?;
        // Cassandra tells the row only if the condition failed, ScyllaDB always: columns go by name.
        let column = |name| rows.column_specs().get_by_name(name).map(|(at, _)| at);
        let (applied, holder) = (column("[applied]"), column("holder"));
        let row = rows.first_row::<scylla::value::Row>().map_err(away)?;
        let value = |at: Option<usize>| at.and_then(|at| row.columns.get(at)?.clone());
        let applied = value(applied) == Some(CqlValue::Boolean(true));
        Ok((applied, value(holder).and_then(|holder| holder.as_bigint())))
    }
}

/// A prepare fails for want of a table, or because nobody answers.
fn missing(place: &str, error: &PrepareError) -> StoreError {
    let no_table = matches!(
        error,
        PrepareError::AllAttemptsFailed {
            first_attempt: RequestAttemptError::DbError(DbError::Invalid, _)
        }
    );
    if no_table { StoreError::NoSchema(format!("scylla://{place}")) } else { away(error) }
}

fn signed(id: u64) -> i64 {
    i64::from_ne_bytes(id.to_ne_bytes())
}

fn unsigned(id: i64) -> u64 {
    u64::from_ne_bytes(id.to_ne_bytes())
}

fn bucket(host: HostId) -> i16 {
    i16::from_ne_bytes(host.bucket().0.to_ne_bytes())
}

fn row_values(row: &Row) -> (i16, i64, i64, Vec<u8>, i64) {
    let said = write_row(row).to_vec();
    (bucket(row.host), signed(row.host.0), signed(row.word.0), said, row.written())
}

fn unlogged(statement: &PreparedStatement, len: usize) -> CqlBatch {
    let statements = vec![BatchStatement::PreparedStatement(statement.clone()); len];
    let mut batch = CqlBatch::new_with_statements(BatchType::Unlogged, statements);
    batch.set_is_idempotent(true);
    batch
}

impl Store for ScyllaStore {
    fn shared(&self) -> bool {
        true
    }

    fn upsert<'a>(&'a self, batch: &'a Batch) -> Doing<'a, ()> {
        async move {
            if batch.rows.is_empty() {
                return Ok(());
            }
            let values: Vec<_> = batch.rows.iter().map(row_values).collect();
            let statements = unlogged(&self.upsert, values.len());
            self.session.batch(&statements, values).await.map(drop).map_err(away)
        }
        .boxed()
    }

    fn remove<'a>(&'a self, gone: &'a [Silent]) -> Doing<'a, ()> {
        async move {
            let mut gone = gone.to_vec();
            gone.sort_unstable_by_key(|silent| silent.host);
            let partitions: Vec<Vec<Silent>> = gone
                .chunk_by(|a, b| a.host.bucket() == b.host.bucket())
                .map(<[Silent]>::to_vec)
                .collect();
            let removals = stream::iter(partitions).map(|part| self.remove_partition(part));
            removals.buffer_unordered(REMOVALS).try_collect().await
        }
        .boxed()
    }

    fn words(&self, [first, second]: [HostId; 2]) -> Doing<'_, [Option<CapacityWord>; 2]> {
        async move {
            let (first, second) = tokio::join!(self.word_of(first), self.word_of(second));
            Ok([first?, second?])
        }
        .boxed()
    }

    fn scan_parts(&self) -> u32 {
        SCAN_PARTS
    }

    fn scan(&self, part: u32) -> Doing<'_, Vec<Row>> {
        async move {
            // Tokens are all of i64 but its least; the first range begins there, the last ends at the greatest.
            let step = (u64::MAX / u64::from(SCAN_PARTS)) + 1;
            let edge = |at: u32| signed((u64::from(at) * step) ^ (1 << 63));
            let last = part + 1 == SCAN_PARTS;
            let range = (edge(part), if last { i64::MAX } else { edge(part + 1) });
            let pages = self.session.execute_iter(self.scan.clone(), range).await.map_err(away)?;
            let mut stream = pages.rows_stream::<(i64, Vec<u8>)>().map_err(away)?;
            let mut rows = Vec::new();
            while let Some((host, said)) = stream.try_next().await.map_err(away)? {
                let host = HostId(unsigned(host));
                match read_row(host, &said) {
                    Some(row) => rows.push(row),
                    // Of a newer build, say: it must not stop the scan of all others.
                    None => tracing::warn!(%host, "a row cannot be read and is left out"),
                }
            }
            Ok(rows)
        }
        .boxed()
    }

    fn lease(&self, aggregator: u64, ttl_ms: u64) -> Doing<'_, bool> {
        async move {
            let me = signed(aggregator);
            let ttl_s = i32::try_from(ttl_ms.div_ceil(1_000)).unwrap_or(i32::MAX);
            let (taken, holder) =
                self.conditional(&self.lease_take, (PUBLISHER, me, ttl_s)).await?;
            if taken || holder != Some(me) {
                return Ok(taken);
            }
            let renew = (ttl_s, me, PUBLISHER, me);
            Ok(self.conditional(&self.lease_renew, renew).await?.0)
        }
        .boxed()
    }

    fn drains(&self) -> Doing<'_, Vec<Drain>> {
        async move {
            let got = self.session.execute_unpaged(&self.drains, (FLEET,)).await.map_err(away)?;
            let rows = got.into_rows_result().map_err(away)?;
            let rows = rows.rows::<(i64, i64, i64, String)>().map_err(away)?;
            rows.map(|row| {
                let (host, deadline_ms, since_ms, message) = row.map_err(away)?;
                Ok(Drain {
                    host: HostId(unsigned(host)),
                    deadline_ms: unsigned(deadline_ms),
                    since_ms: unsigned(since_ms),
                    message,
                })
            })
            .collect()
        }
        .boxed()
    }

    fn set_drain<'a>(&'a self, drain: &'a Drain) -> Doing<'a, ()> {
        async move {
            let values = (
                FLEET,
                signed(drain.host.0),
                signed(drain.deadline_ms),
                signed(drain.since_ms),
                &drain.message,
            );
            self.session.execute_unpaged(&self.drain_set, values).await.map(drop).map_err(away)
        }
        .boxed()
    }

    fn clear_drain(&self, host: HostId) -> Doing<'_, ()> {
        async move {
            let values = (FLEET, signed(host.0));
            self.session.execute_unpaged(&self.drain_clear, values).await.map(drop).map_err(away)
        }
        .boxed()
    }

    fn keep_sandboxes<'a>(&'a self, batch: &'a [Kept]) -> Doing<'a, ()> {
        async move {
            if batch.is_empty() {
                return Ok(());
            }
            let ttl_s = i32::try_from(RECORD_LIVES_MS / 1_000).unwrap_or(i32::MAX);
            let values: Vec<_> = batch
                .iter()
                .map(|kept| {
                    let id = kept.record.sandbox;
                    (
                        kept.record.tenant.as_str(),
                        i16::from(kept.partition()),
                        signed(id.host.0),
                        signed(id.local),
                        kept.to_bytes(),
                        i64::try_from(kept.version).unwrap_or(i64::MAX),
                        ttl_s,
                    )
                })
                .collect();
            let statements = unlogged(&self.sandbox_put, values.len());
            self.session.batch(&statements, values).await.map(drop).map_err(away)
        }
        .boxed()
    }

    fn sandboxes<'a>(&'a self, tenant: &'a str, partition: u8, max: usize) -> Doing<'a, Vec<Kept>> {
        async move {
            let limit = i32::try_from(max).unwrap_or(i32::MAX);
            let key = (tenant, i16::from(partition), limit);
            let got = self.session.execute_unpaged(&self.sandboxes, key).await.map_err(away)?;
            let rows = got.into_rows_result().map_err(away)?;
            let rows = rows.rows::<(i64, i64, Vec<u8>)>().map_err(away)?;
            let mut kept = Vec::new();
            for row in rows {
                let (host, local, record) = row.map_err(away)?;
                let id = SandboxId { host: HostId(unsigned(host)), local: unsigned(local) };
                match Kept::from_bytes(id, &record) {
                    Some(row) => kept.push(row),
                    None => {
                        tracing::warn!(%id, "a sandbox's record cannot be read and is left out")
                    }
                }
            }
            Ok(kept)
        }
        .boxed()
    }

    fn check(&self) -> Doing<'_, String> {
        async move {
            let drains = self.drains().await.map_err(too_few)?.len();
            let nodes = self.session.get_cluster_state().get_nodes_info().len();
            let nodes = if nodes == 1 { "1 node".to_owned() } else { format!("{nodes} nodes") };
            Ok(format!("scylla://{}: {nodes}, tables are there, {drains} drains", self.place))
        }
        .boxed()
    }
}
