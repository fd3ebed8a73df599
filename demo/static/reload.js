// Shows the page anew when its job has ended, but not while somebody types a query.

addEventListener("jobdone", () => document.activeElement?.id === "q" || location.reload());
addEventListener("joberror", ({ detail: error }) => error.problem?.status === 404 && location.reload());
