/** What the API's description says of events and bodies, and the types that clients get of them. */
import { type Static, type TUnsafe, Type } from "@sinclair/typebox";

import { getEventTypes, MAX_ID_BYTES, MAX_USER_ID_BYTES } from "../event/event.ts";
import type { EventSchema } from "./event-schema.ts";

/** The event as it is sent. Other fields are allowed and kept in the journal. */
export const EventShape = Type.Object(
  {
    userId: Type.String({
      minLength: 1,
      description: `1 to ${MAX_USER_ID_BYTES} UTF-8 bytes, no NUL`,
    }),
    name: Type.String({ description: "one of the event types" }),
    value: Type.Number({
      description: "below 10^15, with at most 9 decimals and 15 significant digits as written",
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

/**
 * The bodies, for typed clients only. Nothing but `decodeEvent` checks them, because it sees the digits
 * as written. With a schema here, the OpenAPI plugin would omit what `detail` says of the body, since
 * Elysia does not parse it.
 */
export const EventBody = undefined as unknown as TUnsafe<Static<typeof EventShape>>;
export const EventsBody = undefined as unknown as TUnsafe<string>;

/** An event in OpenAPI's words: the types in force, and the team's own schema. */
export function describeEvent(own: EventSchema | null): object {
  const { properties, ...rest } = EventShape;
  const name = { ...properties.name, enum: [...getEventTypes().keys()] };
  const event = { ...rest, properties: { ...properties, name } };
  return own ? { allOf: [event, own.document] } : event;
}

/** A body in OpenAPI's words that Elysia does not parse. */
export function describeBody(type: string, schema: object = { type: "string" }) {
  return { required: true, content: { [type]: { schema } } };
}
