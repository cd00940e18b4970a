/** What a server requires of the stream and its nats-servers, and how it reaches them. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { nkeys } from "@nats-io/transport-node";

import { checkJournalUrl, parseJournalUrl } from "../../lib/journal/url.ts";
import { openStream } from "../../lib/journal/stream.ts";
import { openStreamJournal } from "../../lib/journal/stream-writer.ts";
import { openLedger } from "../support/ledger.ts";
import { hasNats, openNats, openTcpProxy } from "../support/nats.ts";
import { root, run, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(60_000);

/** What a node answers to `/jsz`. */
interface Jetstream {
  meta_cluster?: { leader?: string };
}

/** What a stream at this URL is refused for, or what is said about it. */
async function tryStream(url: string): Promise<string> {
  const said: string[] = [];
  try {
    const stream = await openStream(url, (line) => said.push(line));
    await stream.close();
    return `opened: ${said.join("\n")}`;
  } catch (error) {
    return (error as Error).message;
  }
}

test.each([
  ["nats://a/s", { servers: ["a"], stream: "s", requiresTls: false }],
  ["tls://a:1,b:2/s_1?replicas=5", { servers: ["a:1", "b:2"], stream: "s_1", replicas: 5 }],
  ["nats://me:p%40ss:@a/s", { user: "me", password: "p@ss:", servers: ["a"] }],
  ["nats://[::1]:4222/s?creds=/a/b.creds", { servers: ["[::1]:4222"], creds: "/a/b.creds" }],
])("JOURNAL_URL %s is read", (url, parts) => {
  expect(parseJournalUrl(url)).toMatchObject(parts);
});

test.each([
  ["nats://a", "use nats://HOST[,HOST…]/STREAM[?replicas=N], tls:// for TLS"],
  ["nats://a,/s", "a host is not a name or an address with or without a port"],
  ["nats://a/a.b", "the name of the stream must have 1 to 64 letters, digits, _ and -"],
  ["nats://a/s?replicas=0", "replicas must be a number from 1 to 5"],
  ["nats://a/s?retries=1", "an unknown parameter: known are replicas,creds,ca"],
  ["nats://me:x@a/s?creds=f", "it has both a user and creds: use one of them"],
])("JOURNAL_URL %s is refused", (url, why) => {
  expect(checkJournalUrl({ JOURNAL_URL: url })[0]).toStartWith(`JOURNAL_URL is invalid: ${why}`);
});

test.if(hasNats)("a server without a cluster gets one replica, and a warning", async () => {
  await using nats = await openNats({ nodes: 1 });
  const said = await tryStream(nats.url());
  expect(said).toContain("stream daybook has 1 replica: an event is lost with the disk");
  expect(said).toContain('relies on "sync_interval: always"');
});

test.if(hasNats)("in a cluster of two, a stream is refused: it needs three", async () => {
  await using nats = await openNats({ nodes: 2 });
  expect(await tryStream(nats.url())).toContain(
    "cannot create stream daybook with 3 replicas in cluster test",
  );
});

test.if(hasNats)("a start waits for the nodes of a cluster that is starting", async () => {
  // The other two have never seen it: one that was there before is known, and waited for in any case.
  await using nats = await openNats({ started: 2 });
  const [first, , third] = nats.nodes;
  await until(async () => {
    const state = (await (await fetch(`${first!.monitor}/jsz`)).json()) as Jetstream;
    return state.meta_cluster?.leader;
  }, 30_000);
  const said: string[] = [];
  const opening = openStream(nats.url(), (line) => said.push(line));
  await until(() => said.some((line) => line.startsWith("waiting for stream daybook at ")), 30_000);
  third!.start();
  await (await opening).close();
});

test.if(hasNats).each([
  ["2.10.27", "JOURNAL_URL: nats-server 2.10.27 is too old: use 2.11.0 or later"],
  ["2.11.0-preview.2", "opened: nats-server 2.11.0-preview.2 is older than 2.15.1, with which"],
  ["2.14.9", "opened: nats-server 2.14.9 is older than 2.15.1, with which this version was tested"],
  ["2.15.1", "opened: stream daybook has 1 replica"],
  ["3.0.0", "opened: stream daybook has 1 replica"],
])("of nats-server %s a start says: %s", async (version, says) => {
  await using nats = await openNats({ nodes: 1 });
  const inInfo = (text: string) => text.replace(/"version":"[^"]+"/, `"version":"${version}"`);
  await using proxy = await openTcpProxy(() => nats.nodes[0]!.port, inInfo);
  expect(await tryStream(`nats://127.0.0.1:${proxy.port}/daybook`)).toStartWith(says);
});

test.if(hasNats)(
  "what differs in an existing stream is named, with the command that changes it",
  async () => {
    await using nats = await openNats();
    expect(await tryStream(nats.url())).toContain("stream daybook: an answer 201 relies on");
    await nats.edit("daybook", { max_bytes: 10 ** 9, description: "ours", compression: "s2" });
    expect(await tryStream(nats.url())).toStartWith("opened: ");
    expect(await tryStream(`${nats.url()}?replicas=5`)).toContain(
      "num_replicas is 3, required is 5",
    );
    await nats.edit("daybook", { max_age: 3600 * 10 ** 9, num_replicas: 1 });
    expect(await tryStream(nats.url())).toBe(
      "JOURNAL_URL: stream daybook cannot hold the journal: max_age is 3600000000000, required is 0; " +
        "num_replicas is 1, required is 3. Run: nats stream edit daybook --max-age=0 --replicas=3",
    );
    expect(await tryStream(`${nats.url()}?replicas=1`)).toContain("max_age is");
    await nats.edit("daybook", { max_age: 0 });
    expect(await tryStream(`${nats.url()}?replicas=1`)).toStartWith("opened: ");
    await nats.edit("daybook", { num_replicas: 3, allow_direct: false, max_msg_size: 1000 });
    const found = await tryStream(nats.url());
    expect(found).toContain("allow_direct is false, required is true");
    expect(found).toContain("max_msg_size is 1000, required is 131072");
  },
);

test.if(hasNats)("a nats-server with a small max_payload is refused", async () => {
  await using nats = await openNats({ nodes: 1, more: "max_payload: 65536" });
  expect(await tryStream(nats.url())).toBe(
    "JOURNAL_URL: max_payload of the nats-server is 65536: set at least 131072 in its configuration",
  );
});

test.if(hasNats)("without JetStream, a start says so", async () => {
  await using nats = await openNats({ nodes: 1, hasJetStream: false });
  const said: string[] = [];
  const opening = openStream(nats.url(), (line) => said.push(line)).catch((error: Error) => error);
  while (said.length === 0) await Bun.sleep(10);
  expect(said[0]).toContain("JetStream is not enabled");
  await opening;
});

test.if(hasNats)("a user and a password are presented, and wrong ones named", async () => {
  await using nats = await openNats({
    nodes: 1,
    more: 'authorization { users: [{ user: daybook, password: "p@ss" }] }',
  });
  expect(await tryStream(nats.url("s", "daybook:p%40ss@"))).toStartWith("opened: ");
  expect(await tryStream(nats.url("s", "daybook:wrong@"))).toBe(
    "cannot open stream s of JOURNAL_URL: the server refuses the user or password",
  );
});

test.if(hasNats)(
  "a stream that cannot be used ends every program with code 2, and one line",
  async () => {
    await using nats = await openNats({
      nodes: 1,
      more: 'authorization { users: [{ user: daybook, password: "x" }] }',
    });
    await using ledger = await openLedger({ JOURNAL_URL: nats.url("s", "daybook:wrong@") });
    const why = "cannot open stream s of JOURNAL_URL: the server refuses the user or password";
    const app = await run("app.ts", { env: ledger.env });
    expect(app.code).toBe(2);
    expect(app.stderr).toContain(why);
    const processor = await ledger.tool([]);
    expect(processor.code).toBe(2);
    expect(processor.stderr).toContain(why);
    expect(await ledger.tool(["--check"])).toMatchObject({ code: 2, stderr: `${why}\n` });
  },
);

test.if(hasNats)(
  "the permissions in deploy/README.md are enough, and missing ones are named",
  async () => {
    const readme = readFileSync(join(root, "deploy/README.md"), "utf8");
    const [permissions] = /permissions: \{[^}]*\}/.exec(readme)!;
    const more = (text: string) =>
      `authorization { users: [{ user: daybook, password: x, ${text} }] }`;
    await using nats = await openNats({ nodes: 1, more: more(permissions) });
    const journal = await openStreamJournal(nats.url("daybook", "daybook:x@"));
    await journal.append(Buffer.from("a\n"));
    const stream = await openStream(nats.url("daybook", "daybook:x@"));
    expect(await stream.isLive(journal.id)).toBe(true);
    expect(await stream.read(journal.id, 1)).toHaveLength(1);
    await stream.purge(journal.id, 1);
    for await (const { seq } of stream.readElsewhere(journal.id, 1)) expect(seq).toBe(1);
    await stream.close();
    await journal.close();
    await using other = await openNats({
      nodes: 1,
      more: more('permissions { publish: ["_INBOX.>"] }'),
    });
    expect(await tryStream(other.url("daybook", "daybook:x@"))).toMatch(/permission/i);
  },
);

test.if(hasNats)("TLS is used, and a certificate of an unknown authority refused", async () => {
  using folder = tempDir();
  certify(folder.path);
  const tls = `tls { cert_file: "${folder.file("certificate.pem")}", key_file: "${folder.file("key.pem")}" }`;
  await using nats = await openNats({ nodes: 1, more: tls });
  const port = nats.nodes[0]!.port;
  const opened = await tryStream(`tls://localhost:${port}/s?ca=${folder.file("authority.pem")}`);
  expect(opened).toStartWith("opened: ");
  const said: string[] = [];
  openStream(`tls://localhost:${port}/s`, (line) => said.push(line)).catch(() => {});
  while (said.length === 0) await Bun.sleep(10);
  expect(said[0]).toMatch(/certificate/);
});

test.if(hasNats)("credentials of a file are presented, and expired ones named", async () => {
  using folder = tempDir();
  const { config, credsOf } = issueCredentials();
  await using nats = await openNats({ nodes: 1, more: config });
  const now = Math.floor(Date.now() / 1000);
  const file = folder.file("daybook.creds");
  const url = `${nats.url("s")}?creds=${file}`;
  expect(await tryStream(url)).toBe(`JOURNAL_URL: cannot read the credentials ${file} (ENOENT)`);
  writeFileSync(file, credsOf(now - 5));
  expect(await tryStream(url)).toStartWith(`JOURNAL_URL: the credentials in ${file} expired at 20`);
  writeFileSync(file, credsOf(now + 3600));
  expect(await tryStream(url)).toStartWith("opened: ");
  writeFileSync(file, "nothing\n");
  expect(await tryStream(url)).toContain(`${file} holds no credentials`);
});

/** An authority, and a certificate of it for localhost. */
function certify(path: string): void {
  const openssl = (...args: string[]) => {
    const { success, stderr } = Bun.spawnSync(["openssl", ...args], { cwd: path });
    if (!success) throw new Error(stderr.toString());
  };
  const create = ["req", "-newkey", "rsa:2048", "-nodes"];
  openssl(
    ...[...create, "-x509", "-subj", "/CN=test authority", "-days", "2"],
    ...["-keyout", "authority.key", "-out", "authority.pem"],
  );
  openssl(...create, "-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "request.pem");
  writeFileSync(`${path}/names`, "subjectAltName=DNS:localhost");
  openssl(
    ...["x509", "-req", "-in", "request.pem", "-CA", "authority.pem", "-CAkey", "authority.key"],
    ...["-CAcreateserial", "-days", "2", "-extfile", "names", "-out", "certificate.pem"],
  );
}

/** The configuration of a server with an operator, and credentials of a user, by when they expire. */
function issueCredentials() {
  const operator = nkeys.createOperator();
  const account = nkeys.createAccount();
  const system = nkeys.createAccount();
  const sign = (issuer: nkeys.KeyPair, subject: nkeys.KeyPair, claims: object, more = {}) => {
    const encode = (value: object) => Buffer.from(JSON.stringify(value)).toString("base64url");
    const times = { jti: crypto.randomUUID(), iat: Math.floor(Date.now() / 1000), ...more };
    const names = { iss: issuer.getPublicKey(), sub: subject.getPublicKey(), name: "test" };
    const nats = { version: 2, ...claims };
    const text = `${encode({ typ: "JWT", alg: "ed25519-nkey" })}.${encode({ ...times, ...names, nats })}`;
    return `${text}.${Buffer.from(issuer.sign(Buffer.from(text))).toString("base64url")}`;
  };
  const none = {
    subs: -1,
    data: -1,
    payload: -1,
    imports: -1,
    exports: -1,
    wildcards: true,
    conn: -1,
    leaf: -1,
  };
  const storage = { mem_storage: -1, disk_storage: -1, streams: -1, consumer: -1 };
  const jwts = {
    operator: sign(operator, operator, { type: "operator", system_account: system.getPublicKey() }),
    system: sign(operator, system, { type: "account", limits: none }),
    account: sign(operator, account, { type: "account", limits: { ...none, ...storage } }),
  };
  const config = `operator: ${jwts.operator}
    resolver: MEMORY
    system_account: ${system.getPublicKey()}
    resolver_preload: { ${system.getPublicKey()}: ${jwts.system}, ${account.getPublicKey()}: ${jwts.account} }`;
  const credsOf = (exp: number) => {
    const user = nkeys.createUser();
    const limits = { subs: -1, data: -1, payload: -1 };
    const jwt = sign(account, user, { type: "user", pub: {}, sub: {}, ...limits }, { exp });
    const seed = Buffer.from(user.getSeed()).toString();
    return `-----BEGIN NATS USER JWT-----\n${jwt}\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n${seed}\n------END USER NKEY SEED------\n`;
  };
  return { config, credsOf };
}
