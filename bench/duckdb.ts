/**
 * The reference "an engine": DuckDB reads and groups the file on all cores, and one upsert through
 * postgres.js posts the result.
 *
 *     DATABASE_URL=… bun bench/duckdb.ts FILE
 */
import { DuckDBInstance } from "@duckdb/node-api";
import postgres from "postgres";

const [path = ""] = Bun.argv.slice(2);
const duckdb = await (await DuckDBInstance.create(":memory:")).connect();
const result = await duckdb.runAndReadAll(`
  select "userId", sum(case name when 'add_revenue' then value else -value end)::varchar
  from read_json('${path}', format = 'newline_delimited',
    columns = {userId: 'varchar', name: 'varchar', value: 'decimal(24, 9)'})
  group by "userId"`);
const [users, sums] = result.getColumns() as [string[], string[]];
const sql = postgres(Bun.env["DATABASE_URL"] ?? "", { max: 1, onnotice: () => {} });
await sql`
  insert into users_revenue as balance (user_id, revenue)
  select * from unnest(${users}::text[], ${sums}::numeric[])
  on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue`;
await sql.end();
process.exit();
