/** What an event looks like, as far as a schema can say it: for the types and the description of the API. */
import { type Static, Type } from "@sinclair/typebox";

import { MAX_ID_BYTES, MAX_USER_ID_BYTES } from "../event/event.ts";

/** The event as it is sent; other fields are allowed and kept in the journal. */
export const EventShape = Type.Object(
  {
    userId: Type.String({
      minLength: 1,
      description: `1 to ${MAX_USER_ID_BYTES} UTF-8 bytes, no NUL`,
    }),
    name: Type.String({ description: "one of the kinds of events" }),
    value: Type.Number({
      description: "size below 10^15, at most 9 decimals and 15 significant digits as written",
    }),
    id: Type.Optional(
      Type.String({
        minLength: 1,
        description: `1 to ${MAX_ID_BYTES} UTF-8 bytes; events with the same id count once`,
      }),
    ),
  },
  {
    additionalProperties: true,
    examples: [{ userId: "user1", name: "add_revenue", value: 98 }],
  },
);
export type Event = Static<typeof EventShape>;
