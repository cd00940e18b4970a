/**
 * How much is tried in one transaction. A batch that failed is tried smaller and longer: a database
 * that is slow, or loses a connection now and then, still gets through (seen: 50,000 users and a
 * backend that is ended every 100 ms never did).
 */
const MAX_USERS = 200_000;
const MIN_USERS = 1_000;
const MIN_MS = 10_000;
const MAX_MS = 120_000;

export class BatchLimit {
  /** One transaction changes about this many balances: 200,000 take some 0.8 s. */
  users = MAX_USERS;
  /** Postgres gives up on the statement after this long, and its locks go with it. */
  timeoutMs = MIN_MS;

  /** It failed after `ms`: only what took its time gets more of it. */
  failed(ms: number): void {
    this.users = Math.max(MIN_USERS, Math.floor(this.users / 4));
    if (ms >= this.timeoutMs) this.timeoutMs = Math.min(MAX_MS, this.timeoutMs * 2);
  }

  succeeded(): void {
    this.users = Math.min(MAX_USERS, this.users * 2);
    this.timeoutMs = MIN_MS;
  }
}
