/**
 * The deliberate breaks. Each takes one promise of the program away by replacing a few tokens (altered.ts
 * finds their place); the tests named beside it must then fail. `bun run faults --breaks [NAME]` tries
 * them one by one (try-breaks.ts); breaks.test.ts checks that each still finds its place.
 */
import type { Alteration } from "./altered.ts";

export interface Break extends Alteration {
  /** The promise. */
  what: string;
  /** The tests that must fail. */
  tests: string[];
}

/** Without `what`, one of the `tests` below tests/ must fail. */
const without = (what: string, find: string, put: string, ...tests: string[]): Break => ({
  what,
  find,
  put,
  tests: tests.map((name) => `tests/${name}.test.ts`),
});

export const BREAKS: readonly Break[] = [
  // The writer of the journal.
  without(
    "the end of a search among colliding ids",
    "left -= COLLISION_PROBES - 1;\n      }",
    "left++;\n      }",
    "unit/scanner",
  ),
  without(
    "the turn of others between two slices of a body",
    "if (place.index > 0) await nextTurn();",
    "",
    "unit/turns",
  ),
  without(
    "the turns that slices take one after the other",
    "waiting[0]?.();\n  waiting.shift();",
    "for (const go of waiting.splice(0)) go();",
    "unit/turns",
  ),
  without(
    "the end of a connection whose body is refused",
    'if (status >= 400 && (await mustClose(request, response)))\n        response.headers.set("connection", "close");',
    "",
    "server/listener",
  ),
  without("the path behind a short host", "lengthenHost(request);", "", "server/listener"),
  without(
    "the requirement that times in a token are finite",
    'if (![exp, nbf, iat].every(Number.isFinite)) throw new InvalidToken("malformed");',
    "",
    "server/auth",
  ),
  without("the sync of a frame", "await sync();", "", "faults/disk"),
  without(
    "the order: sync first, then acknowledge",
    "await write(frame);",
    "for (const { resolve } of group) resolve(header.base + end); await write(frame);",
    "faults/disk",
  ),
  without(
    "the sync of the directory at start",
    "await disk.syncDirectory(directory);",
    "",
    "faults/disk",
  ),
  without("the sync of the next file of a rotation", "await next.sync();", "", "faults/disk"),
  without(
    "the sync of the directory between the two renames of a rotation",
    "await syncDirectory(); await disk.rename(",
    "await disk.rename(",
    "faults/disk",
  ),
  without(
    "the sync of the directory after the two renames of a rotation",
    "await syncDirectory(); await file.close(",
    "await file.close(",
    "faults/disk",
  ),
  without(
    "the base of the file after an interrupted rotation",
    "last?.to ?? 0",
    "0",
    "faults/disk",
  ),
  without("the truncation of a torn tail", "await file.truncate(end);", ";", "faults/disk"),
  without(
    "the truncation of a frame that did not fit on the disk",
    "await file.truncate(end).catch((error)",
    "await Promise.resolve().catch((error)",
    "journal/writer",
  ),
  without(
    "the end of writing after a failed sync",
    'fail("sync", codeOf(error))',
    "error",
    "journal/writer",
  ),
  without(
    "the truncation after a failed sync",
    "await file.truncate(end).catch(() => {});",
    "",
    "faults/disk",
  ),
  without(
    "the lock of the writer",
    "if (!lock) throw new Error(`${path} is being written by another process; stop it first`); let file",
    "let file",
    "settings",
    "journal/writer",
  ),
  without(
    "the check that the journal is still the same file",
    "if (!file.is(path, end + frame.length))",
    "if (false)",
    "journal/writer",
  ),
  without(
    "the wait for commits in progress when the journal closes",
    "while (committing) await committing;",
    "",
    "faults/disk",
  ),
  without(
    "the position before a header that no frame follows",
    "hasFrames() ? header.base + end : header.base",
    "header.base + end",
    "journal/rotation",
    "processor/ids",
  ),
  without(
    "the closing of the next file when a rotation fails",
    "await next.close().catch(() => {});",
    "",
    "journal/writer",
  ),
  without(
    "a time that readers accept, whatever the clock says",
    "toFrameTime(disk.now())",
    "disk.now()",
    "journal/writer",
  ),
  without(
    "one id for a key with and without quotes",
    `if (header.startsWith('"'))`,
    "if (false)",
    "server/idempotency-key",
  ),
  without(
    "the refusal of two keys in one request",
    "if (JOINED.test(header))",
    "if (false)",
    "server/idempotency-key",
  ),
  without(
    "the check of a source's digest",
    'if (hash) return hash.copy().digest("hex") === digest;',
    "",
    "server/sources",
  ),
  without(
    "the digest of a source in memory, from piece to piece",
    "state.hash?.copy()",
    "undefined",
    "server/sources",
  ),
  without(
    "that only its own route reads the user from the query",
    "path === USERS_PATH ?",
    "path !== '' ?",
    "server/auth",
  ),
  without(
    "that only a failed sync ends the journal: EMFILE passes",
    'throw passing("append to", error);',
    'throw fail("append to", codeOf(error));',
    "journal/writer",
  ),
  without(
    "that a rotation tries again without a descriptor",
    'catch(troubled("create the file after"))',
    'catch((error) => { throw fail("create", codeOf(error)); })',
    "journal/writer",
  ),
  without(
    "the descriptors that are held in reserve for the journal",
    'code === "EMFILE" || code === "ENFILE" ? reserve.pop() : undefined',
    "undefined",
    "server/descriptors",
  ),
  without(
    "the seconds by which Bun closes an idle connection early",
    "address.IDLE_SECONDS + EARLY_S",
    "address.IDLE_SECONDS",
    "server/listener",
  ),
  without("IDLE_SECONDS", "address.IDLE_SECONDS + EARLY_S", "MAX_IDLE_S", "server/listener"),
  without(
    "the handler of SIGHUP where there is no certificate",
    'process.on("SIGHUP", () => reload());',
    "",
    "server/listener",
  ),
  without("the closing of idle connections", "server.closeIdle();", "", "server/descriptors"),
  without(
    "the blanks of a line as a part of its length",
    "if (lineBytes(bytes, from, next) > maxBytes)",
    "if (end - start > maxBytes)",
    "server/http",
    "unit/lines",
  ),
  without(
    "the room for an Idempotency-Key in a line of the journal",
    "MAX_EVENT_BYTES + 512",
    "MAX_EVENT_BYTES",
    "server/http",
  ),
  without("the offset of the last frames of a large file", "from += skip;", "", "journal/writer"),

  // Bytes on disk.
  without(
    "the disk space that is left to the embedded Postgres",
    "if (blocks > 0 && bavail * bsize - bytes.length < reserved)",
    "if (false)",
    "faults/full",
  ),
  without(
    "the system's sync of a file",
    "sync: () => handle.datasync()",
    "sync: async () => {}",
    "journal/writer",
  ),
  without(
    "the system's sync of a directory",
    "withHandle(path, (handle) => handle.sync())",
    "withHandle(path, async () => {})",
    "journal/writer",
  ),
  without(
    "the system's sync of what another process wrote",
    "ifExists(path, (handle) => handle.datasync())",
    "ifExists(path, async () => {})",
    "journal/writer",
  ),
  without(
    "the sync of a directory that is created",
    "await disk.syncDirectory(dirname(at));",
    "",
    "journal/writer",
  ),
  without(
    "the checksum of a frame",
    "if (found === parseInt(sum, 16)) return",
    "return",
    "faults/tail",
    "faults/fuzz",
  ),
  without(
    "the checksum in a journal's id",
    "|| !isJournalId(match[1] as string)",
    "",
    "faults/tail",
  ),
  without(
    "the reader's use of one descriptor for the header and the frames of a file",
    "const header = await readActiveHeader(path, file);",
    "const header = await disk.withFile(path, (other) => readActiveHeader(path, other));",
    "journal/rotation",
  ),
  without(
    "the reader's check of what precedes the active file",
    "!isRenamed && (last.id",
    "false && (last.id",
    "faults/tail",
  ),
  without(
    "the rule that tells a torn tail from damage",
    'rest === "short" || !rest.hasMore',
    "true",
    "processor/repair",
  ),
  without("the sync of a repaired file", "await repaired.sync();", "", "faults/disk"),
  without(
    "the sync of bytes that are moved aside",
    "await file.sync(); await file.close",
    "await file.close",
    "faults/disk",
  ),

  // Posting.
  without("the reader's own sync before it posts", "await journal.sync();", "", "journal/rotation"),
  without(
    "the check that the writer has not truncated what was read",
    "if ((await journal.end()) < position)",
    "if (false)",
    "journal/rotation",
  ),
  without(
    "the check of the last frame that was posted",
    "frame?.header === last.header &&",
    "",
    "processor/check",
  ),
  without(
    "the fence in the statement",
    "and checkpoint.position = move.begins",
    "",
    "ledger/ledger",
  ),
  without(
    "the error of a statement whose checkpoint has moved",
    "case when count(*) < (select count(*) from move) then current_setting('daybook.checkpoint_has_moved')::int else 1 end",
    "1",
    "ledger/ledger",
  ),
  without(
    "the claim of ids",
    "select user_id, amount from claim join claimed using (id)",
    "select user_id, amount from claim",
    "processor/ids",
  ),
  without(
    "the pace of postings",
    "(!isBusy || ++polls > GATHERING_POLLS)",
    "true",
    "processor/pace",
  ),
  without(
    "the count of the ids that were inserted",
    "(select count(*) from claimed) = (select count(*) from claim)",
    "true",
    "processor/post-ids",
  ),
  without(
    "the look at the ids of 0.1.0",
    "where $37::text <> '{}'",
    "where false",
    "processor/post-ids",
  ),
  without(
    "the error where a claim cannot be decided",
    "then current_setting('daybook.undecided')::int end",
    "then 1 end",
    "processor/post-ids",
  ),
  without(
    "the addition to the balance that is there",
    "do update set revenue = balance.revenue + excluded.revenue ) select",
    "do update set revenue = excluded.revenue ) select",
    "processor/processor",
  ),
  without(
    "the record of events that were posted before",
    "run - row_number() over (order by run) as island from judged where is_known",
    "0 as island from judged where false",
    "processor/verify",
  ),
  without(
    "the check of the sources under their locks",
    "if (posted.get(key) !== from) return posted;",
    "",
    "server/sources",
  ),
  without(
    "the count of a batch whose answer was lost",
    "if (sent && batches.from === sent.to)",
    "if (false)",
    "faults/postgres",
  ),
  without(
    "the new connection after one that can only be read",
    "if (!(unavailable instanceof RowRefused && used.isReady)) forget(used);",
    'if (!unavailable.message.includes("read-only")) forget(used);',
    "ledger/connection",
  ),
  without(
    "the limits of a transaction where the role has others",
    "then set_config('transaction_timeout', '0', true) end",
    "then '' end",
    "ledger/rights",
  ),
  without(
    "the limits of a transaction whose client has gone",
    "await setLimits(tx, timeoutMs, IDLE_MS);",
    "",
    "ledger/connection",
  ),
  without(
    "the end of a read that nobody waits for",
    "pending?.cancel?.();",
    "",
    "ledger/connection",
  ),
  without(
    "the errors that pass by themselves",
    "(08|25|40|53|55|57|58)|^XX000$",
    "(08|57)",
    "faults/postgres",
  ),
  without(
    "the offset of a source",
    "if (end > postedTo) return true;",
    "return true;",
    "server/sources",
  ),
  without(
    "the quarantine",
    "return this.quarantine(line, position, decoded.reason);",
    "return;",
    "processor/processor",
  ),
  without(
    "the restart of a processor that died",
    "setTimeout(() => (isStopping ? end() : start()), pauseMs);",
    "",
    "faults/process",
  ),
  without(
    "the reason why the processor's thread ended",
    "return error ?? (",
    "return (",
    "faults/process",
  ),
  without(
    "the digest of the posted bytes of a file",
    'if (hash.copy().digest("hex") === digest)',
    "if (true)",
    "processor/processor",
  ),

  // Revenue over time, history, sources that are gone, files that change.
  without(
    "that a point lacks what an id kept from counting",
    "point.events - coalesce(lost.events, 0), point.amount - coalesce(lost.amount, 0)",
    "point.events, point.amount",
    "processor/points",
  ),
  without("the points of deleted segments", "await points.keep();", "", "processor/points"),
  without("the correction of points", "await correctPoints(tx, points);", "", "processor/points"),
  without(
    "that points of a checkpoint that is being posted are left alone",
    "limit ${MAX_FOLDED_SOURCES} for update skip locked",
    "limit ${MAX_FOLDED_SOURCES}",
    "processor/points",
  ),
  without(
    "that the lag is never 0 while something is unposted",
    "Math.max(ageMs, performance.now() - movedMs, 1)",
    "Math.max(ageMs, 0)",
    "processor/retire",
  ),
  without(
    "that sources retired together keep their sum once",
    "from rest where ${hasRest}",
    "from rest",
    "processor/retire",
  ),
  without(
    "that a rebuild moves a checkpoint behind its snapshot",
    "for (const { key, position, removedTo } of behind)",
    "for (const { key, position, removedTo } of behind.slice(behind.length))",
    "processor/retire",
  ),
  without(
    "that a followed file still ends with what was sent",
    "!(await endsWith(upload, place))",
    "false",
    "client/rewritten",
  ),
  without(
    "the look at a file that changed while it was sent",
    "await checkRewritten(upload, end, path);",
    ";",
    "client/rewritten",
  ),
  without(
    "the look at a file that changed while it was posted",
    "if (input.compression || now.mtimeMs === mtimeMs) return;",
    "return;",
    "client/rewritten",
  ),
  without("the least pace of a body", "windowBytes < MIN_WINDOW_BYTES", "false", "unit/arrivals"),
  without(
    "why an event of a history does not count",
    "exclusions.has(position) ? await readReason(tx, key, position) : null",
    "null",
    "processor/history",
  ),
  without(
    "the end of a stream whose reader has gone",
    "if (!hasEnded) ended();",
    "",
    "server/balances",
  ),

  // An operator's tools.
  without(
    "that an event under the id of another is quarantined once",
    "is_same or exists (",
    "is_same or not exists (",
    "processor/quarantine",
  ),
  without(
    "the bound on rows of what does not count",
    "from range where begins < ends and (select count(*) from range) > 5",
    "from range where false",
    "processor/quarantine",
  ),
  without(
    "the bound on lines in quarantine",
    "select 1000 - count(*) from (",
    "select 1000000 - count(*) from (",
    "processor/quarantine",
  ),
  without(
    "that a recount leaves out the packed lines in quarantine",
    "from packed_quarantine, unnest(positions) as index where source = ${key} and",
    "from packed_quarantine, unnest(positions) as index where false and source = ${key} and",
    "processor/quarantine",
  ),
  without(
    "that a packed line is packed again where its release is refused",
    "if (refused.length > 0) await repack",
    "if (false) await repack",
    "processor/quarantine",
  ),
  without(
    "that no recount counts packed lines that were dismissed",
    "select source, from_position, 'dismissed: ' || reason, starts, array(select unnest(starts) + 1) from dismissed where not exists",
    "select source, from_position, 'dismissed: ' || reason, starts, array(select unnest(starts) + 1) from dismissed where exists",
    "processor/quarantine",
  ),
  without(
    "that a packed range that extends beyond a deleted segment is kept",
    "and from_position + ends[cardinality(ends)] <=",
    "and from_position <",
    "processor/quarantine",
  ),
  without(
    "that no recount counts what was dismissed",
    "on conflict do nothing ) select count(*)::int as count from dismissed",
    "where false ) select count(*)::int as count from dismissed",
    "processor/quarantine",
  ),
  without(
    "the ledger's own day: ids are pruned by one reading of a clock",
    "(select day - ${days}::int from boundary)",
    "(now() at time zone 'UTC')::date - ${days}::int",
    "processor/aging",
  ),
  without(
    "the hour before the ledger's day moves",
    "ms - due.sinceMs < DUE_MS",
    "false",
    "processor/aging",
  ),
  without("the age of a segment that is deleted", "|| file.base > oldTo", "", "processor/verify"),
  without(
    "the last file that says which journal it is",
    "if ((await disk.size(path)) === 0) files.pop();",
    "",
    "processor/repair",
  ),
  without("that unposted segments are kept", "|| segment.to > posted", "", "processor/verify"),
  without(
    "the snapshot before a segment is deleted",
    "await snapshotUpTo(database, journal, segment.to);",
    "",
    "processor/verify",
  ),
  without(
    "the sums that replace the rows of a tally that has grown",
    "create temp table summed on commit drop as ${sums()}",
    "create temp table summed on commit drop as select * from tally limit 0",
    "processor/verify",
  ),
  without(
    "the comparison of balances with the recount",
    "balance.revenue as balance from (${tally.sums()}) as tally full join users_revenue as balance using (user_id) where tally.revenue is distinct from balance.revenue",
    "balance.revenue as balance from (${tally.sums()}) as tally full join users_revenue as balance using (user_id) where false",
    "processor/verify",
  ),
  without(
    "the addition of what a rebuild corrects",
    "do update set revenue = balance.revenue + excluded.revenue`;",
    "do update set revenue = excluded.revenue`;",
    "processor/verify",
  ),
  without(
    "the lock of a recount",
    "await tx`lock table removed in share update exclusive mode nowait`;",
    "",
    "processor/verify",
  ),
  without(
    "the look of a recount at corrections under way",
    "await tx`lock table event_types in share update exclusive mode nowait`;",
    "",
    "processor/rebuild",
  ),
  without(
    "the certificate's authority (sslrootcert)",
    'ca: readPem("sslrootcert", root)',
    "",
    "ledger/tls",
  ),
  without(
    "the refusal of a password that ends the URL too early",
    'if ((path + query).includes("@"))',
    "if (false)",
    "unit/url",
  ),
  without(
    "the check that a server can be written",
    'if (session === "read-write" && found?.read_only === "on")',
    "if (false)",
    "ledger/failover",
  ),
  without(
    "the unprepared statements behind a pooler",
    "sql.options.prepare = false",
    "sql.options.prepare = true",
    "ledger/pooler",
  ),
  without(
    "the ledger's word on a torn tail that was posted",
    "if (base + from < posted) damage.push",
    "if (false) damage.push",
    "processor/check",
  ),
  without(
    "the split of damage that is posted in part",
    "splitAt(file, posted);",
    "",
    "processor/repair",
  ),
  without(
    "the clearing of the digest before a repair",
    "if (isLost) await clearDigest",
    "if (false) await clearDigest",
    "processor/repair",
  ),
  without(
    "the removal from quarantine when a line is posted",
    "delete from quarantine where source = ${key} and position = ${position} and not exists (select from claimed where is_other) returning 1",
    "select 1 from line",
    "server/event-types",
    "processor/verify",
  ),

  // Events.
  without(
    "the digits as written",
    'values.find(({ holder }) => holder === event)?.written ?? ""',
    "`${event.value}`",
    "unit/event",
  ),
  without(
    "the rejection of text that Postgres cannot store",
    "|| !isUserId(userId)",
    "",
    "unit/event",
  ),
  without(
    "the scanner's check of UTF-8",
    "if (!isAscii && !isUtf8(bytes.subarray(from, index))) return -1;",
    "",
    "unit/scanner",
  ),
  without(
    "the scanner's limit of digits",
    "if ((whole === 0 ? 0 : digits) + decimals > MAX_SIGNIFICANT_DIGITS) return -1;",
    "",
    "unit/scanner",
  ),
  without(
    "the comparison of users with the same hash",
    "if (this.isUser(row, bytes, from, to)) return row;",
    "return row;",
    "unit/scanner",
  ),
  without(
    "sums that are too large for a double",
    "if (sum < MAX_WHOLE && sum > -MAX_WHOLE) return;",
    "return;",
    "unit/scanner",
  ),

  // The server.
  without(
    "the comparison of secrets",
    "if (timingSafeEqual(digest, presented)) isFound = true;",
    "isFound = true;",
    "server/http",
  ),
  without(
    "the scopes of a token",
    "if (!claims.scopes.includes(scope) && !isOwn)",
    "if (false)",
    "server/auth",
  ),
  without(
    "the algorithms that the settings allow",
    'algorithms: secret ? ["HS256"] : KEY_ALGORITHMS,',
    "",
    "server/auth",
  ),
  without("the expiry that a token must have", 'requiredClaims: ["exp"],', "", "server/auth"),
  without(
    "the 409 for a source at another offset",
    "if (state.offset !== from) return",
    "if (false) return",
    "server/sources",
  ),
  without(
    "the rejection of truncated zstd",
    "if (minBytes === null)",
    "if (minBytes === null) return decompress(bytes, { maxOutputLength: MAX_EVENTS_BYTES }); if (false)",
    "server/http",
  ),
  without(
    "the free failures of a server that has just started",
    "allowedMs.get(address) ?? earliestMs",
    "allowedMs.get(address) ?? 0",
    "server/auth",
  ),

  without(
    "the comparison of the journal with a ledger that answers late",
    "!hasAnswered || waiting.size",
    "waiting.size",
    "processor/check",
  ),

  // What Postgres refuses.
  without(
    "the subtransaction in which the change of a user is tried",
    "exception when data_exception or integrity_constraint_violation or raise_exception then refused := refused || change.user_id",
    "exception when division_by_zero then refused := refused || change.user_id",
    "processor/refused",
  ),
  without(
    "that a violated constraint is not an outage",
    "/^2[23]|^P0001$/",
    "/^22/",
    "processor/refused",
  ),
  without(
    "that only what a row contains makes a line bad",
    "when data_exception or integrity_constraint_violation or raise_exception then indexes",
    "when others then indexes",
    "processor/refused",
  ),
  without(
    "that only the refused lines of a user are quarantined",
    "return findRefusedLines(database, lines);",
    "return new Map(lines.map(({ position }) => [position, reason]));",
    "processor/refused",
  ),

  // The client.
  without(
    "the server's word on a chunk whose answer was lost",
    "if (chunk) await recoverRejected(",
    "if (false) await recoverRejected(",
    "client/client",
  ),
  without(
    "the position of what another client has sent",
    "total.position = conflict.position;",
    "",
    "client/client",
  ),
  without(
    "that a server with less of a source is passed over",
    "if (hasLess && passedOver++ < MAX_PASSED_OVER) continue;",
    "",
    "client/balancer",
  ),
  without(
    "the digest of the stored bytes of a file",
    'if (hash.copy().digest("hex") === digest)',
    "if (true)",
    "client/client",
  ),
  without(
    "the digest of what another client has sent",
    "digestAt(place) === state.digest ? place : null",
    "place",
    "client/client",
  ),
  without(
    "the offset of the last rejected line that is noted",
    "message === undefined || at <= records.lastOffset",
    "message === undefined",
    "client/client",
  ),
  without("that a bar fits the terminal", "if (width >= columns) break;", "", "client/progress"),
  // What the ledger is, and whose.
  without(
    "that each posting asks whether the ledger is still exact",
    "daybook_require_balances($29)",
    "$29::int",
    "ledger/inexact",
  ),
  without(
    "that a posting sees what was committed before its last statement",
    '"isolation level read committed"',
    '""',
    "ledger/inexact",
  ),
  without(
    "the refusal of a type that limits",
    "if modifier >= 0 or found_type",
    "if found_type",
    "ledger/inexact",
  ),
  without(
    "the refusal of an encoding",
    "if getdatabaseencoding() <> 'UTF8' then",
    "if false then",
    "ledger/inexact",
  ),
  without(
    "that a table which is missing is not made again, empty",
    "if noted_version is null or noted_version < this_version then",
    "if true then",
    "ledger/upgrade",
  ),
  without("that 0.1.0 stops", "and attname = 'posted_at'", "and false", "ledger/upgrade"),
  without("that a pause ends", "pause(null);", "", "ledger/inexact"),
  without("the exit code of a ledger that is refused", "isRefused ? 2 : 3", "3", "ledger/inexact"),
  // Files and pipes as they are found.
  without(
    "that a zstd file whose end is missing is damaged",
    "if (walk?.isWhole() === false)",
    "if (false)",
    "unit/formats",
  ),
  without(
    "that bytes which are no event do not pass for sent",
    "total.hasLeftOver = true; const what",
    "const what",
    "client/client",
    "client/input",
  ),
  without(
    "that bytes which are no event do not pass for posted",
    'tell(report.line, "warn"); hasLeftOver = true;',
    'tell(report.line, "warn");',
    "client/input",
  ),
  without(
    "that a processor of FILEs that was stopped says so in its exit code",
    "if (isStopped) return STOPPED[stop.reason as keyof typeof STOPPED];",
    "",
    "client/stop",
  ),
  without(
    "that a client that was stopped says so in its exit code",
    "if (total.isStopped && !follow) return endStopped();",
    "",
    "client/stop",
  ),
  without(
    "that an interrupted --again is continued by --again",
    "if (begun) {",
    "if (false as boolean && begun) {",
    "client/client",
  ),
  without(
    "that lines like frames do not make a file of events a journal",
    "return head && isEventFile(head) ? null : await openJournalReader(path);",
    "return await openJournalReader(path);",
    "processor/processor",
  ),
];
