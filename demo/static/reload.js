// Shows the page anew when its job has ended.

addEventListener("jobdone", () => location.reload());
addEventListener("joberror", ({ detail: error }) => error.problem?.status === 404 && location.reload());
