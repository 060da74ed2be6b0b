// Package scheduler decides who sends which piece to whom.
//
// It is a pure state machine: events in (HostUp, Join, Have, Done, Failed, Tick
// and so on, each with the time), decisions out (Decisions). It does no I/O,
// starts nothing, and knows no clock and no randomness but what it is given, so
// the same events in the same order give the same decisions.
//
// # The words
//
// A host takes part in a task as a peer, which has pieces, needs pieces (it wants
// them, lacks them, and nothing relied upon brings them), or both. A transfer is
// one assignment: a run of pieces that a child gets from a parent. It holds a
// lane at either end until its last bytes are on their way. A copy of a piece is
// one that a host has or that is on the way to it; seeds, which are supernodes, do
// not count. A piece without a copy is fresh.
//
// A lazy peer wants only the pieces that its readers wait for (Want): those alone
// it needs, until it joins for all.
//
// # A piece, as seen from one peer
//
//	           assign                  Soon, Done, Have
//	need ------------------> on the way ----------------> have
//	 ^ ^                      |       |                    |
//	 | +------ end -----------+       | second             |
//	 |  (Failed, Cancel,              v                    |
//	 |   HostDown, Leave)      needed again, and           |
//	 |                         still on the way ---------->|
//	 +---------------------- Lost -------------------------+
//
// # A transfer
//
//	assign, lanes free ---> runs --- lags ---> late ---- second ---> reopened
//	                         |                   |                      |
//	                    Soon |                   | the parent's lane    | so is the
//	                         v                   | is free again        | child's
//	 both lanes are free again,                  v                      v
//	 its pieces count as had       end, by: the last piece (Done), the same
//	                         +-------------> pieces from elsewhere (cancel), Failed,
//	                                         HostDown, Leave, Lost, TaskRemove
//
// A transfer that lags first yields its upload lane, and what it brings no
// longer counts as copies. Then, unless it is the child that is slow, the child
// may get the same pieces from a second parent. Whichever transfer loses is
// cancelled when it has nothing left to bring.
//
// # How lanes find each other
//
// Events only note what changed: hosts in Scheduler.work, whose lanes or needs
// have to be looked at. Decisions calls match, which goes through them:
//
//	open   the host is put into the rosters of its tasks: room (it may send) and
//	       hungry (it needs pieces and may receive)
//	lend   each free upload lane looks for a child among the hungry (childFor)
//	fill   each free download lane looks for a piece and a parent (feed): what a
//	       reader waits for, fresh pieces from a seed, the rarest of a sample from
//	       the best of a few with room, and at last a second copy from a seed
//
// The rosters may hold hosts without a free lane, who are thrown out when found,
// but they never miss one that has: a parent found full is noted in host.offers
// and lends by itself when it has a lane again; a child found full fills itself.
// So no event goes through all hosts. A search gives up after a few looks; who
// was passed over stays in the rosters, and Tick comes back to it.
//
// # What is believed
//
// A host can lie about all it says. What it has got by a transfer counts as a copy
// at once, what it says it has besides only when it has sent some: until then, and
// after it has failed several children in a row, it is doubted (trust.go). No piece
// counts as copied for it, so the seeds send its pieces as fresh; each child tries
// one such parent at a time, when there is none better, and gives it up when it lags
// instead of waiting beside a second one; and it rests ever longer. By what it sends
// it is trusted again, each time by twice as much.
//
// Lanes that are claimed are used a few at a time, and more with each few pieces
// (lent, taking). Who breaks what Soon promised is not believed to end soon (word).
// Who was sent something and took nothing comes after all others (idles). Wrong
// bytes, and failures, count for more, or at all, when a host reports them that has
// itself sent something. sim.TestRogueHosts shows what comes of it.
//
// # Zones
//
// With the zone rule (Config.CrossOnce) every named zone of a task counts its own
// copies. What is the first copy of a piece in a zone crosses into it; that is
// much like a fresh piece from a seed, and comes as early in feed (feedAcross). All
// other pieces a host gets within its zone. So few transfers cross side by side
// (link.window) that each is no slower than a lane, or two: on a thin link more
// would hold their lanes for long and bring the same. What crosses tells nothing
// of its hosts' rates, and is late by the measure of its like. A late one is given
// up, not doubled.
//
// A copy counts when its host may send it: those without upload lanes wait for
// others of their zone to bring a piece, as long as there are such. Who gets
// nothing for a while, because all who hold a piece in its zone have failed it or
// are slow, may have it cross again.
//
// # Why it is so
//
// Between two transfers of a lane lies the way of a report to the supernode, of
// an assignment back, of a request and of its answer, each through queues that
// hold other pieces: a fifth to a third of a piece's own time on a full link. An
// assignment given ahead that waits for lanes hides this, but where the lanes of
// its two ends end at different times one of them is left idle: on a fluid model
// of 30 hosts that costs a quarter of the throughput. So the child says when a
// transfer is about to end (Soon), early by as much as this way takes, and what
// is assigned then begins at once: for the moment that the two overlap, the links
// carry one transfer more. Others may be sent to the child for the pieces from then
// on: until they have heard of it and asked, the pieces are there, or they wait for
// them. So nothing hangs on when Done comes, which can go along with whatever the
// host says next: an assignment takes two messages in place of three.
//
// Parents choose first (lend before fill). That is worth 4 % with 300 hosts.
//
// Faster hosts come first (class), most of all with seeds: a fresh piece that goes
// to a host with a quarter of the others' bandwidth keeps all others waiting.
//
// Three lanes, on hosts and seeds alike. In the model fewer are better, since pieces
// begin and end sooner: 0.954, 0.950 and 0.941 for 16 hosts with two, three and four
// where a request takes a quarter of a piece's time. On real links two leave gaps
// where TCP finds its rate, and four lose more packets to each other. A seed with
// fewer lanes than its hosts loses 4 to 7 %: they share their downlinks among more
// senders than it has receivers.
package scheduler
