"use strict";
// Asks the server that this page came from, on this machine's loopback. A page in a file has no such server.

/** Send JSON and return the JSON that comes back; an Error where the server has ended. */
async function ask(question) {
  const answer = await fetch(location.pathname, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question) });
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return answer.json();
}
