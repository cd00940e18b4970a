/** The server, as the page sees it: with the credential of this tab, which no URL ever holds. */
const KEY = "daybook-credential";

/** The server does not let this credential read. */
export class Denied extends Error {}

export const credential = {
  get: () => sessionStorage.getItem(KEY),
  set: (text: string) => sessionStorage.setItem(KEY, text),
  clear: () => sessionStorage.removeItem(KEY),
};

export async function request(path: string, signal?: AbortSignal): Promise<Response> {
  const given = credential.get();
  const headers = given === null ? undefined : { authorization: given };
  const response = await fetch(path, { ...(headers && { headers }), ...(signal && { signal }) });
  if (response.ok) return response;
  const { status } = response;
  if (status === 401)
    throw new Denied(given === null ? "" : "This secret or token is wrong, or no longer valid.");
  if (status === 403) throw new Denied("This token does not grant reading (scope balances:read).");
  if (status === 429)
    throw new Denied("Too many wrong secrets came from here: wait a few seconds.");
  throw new Error(`status ${status}`);
}

export async function read<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await request(path, signal)).json() as Promise<T>;
}
