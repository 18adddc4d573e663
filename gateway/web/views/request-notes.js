// Notes about requests without an answer, and about the results of requests that a reload
// interrupted.

import { html, useEffect } from '../vendor/htm-preact.js';
import { dismiss, giveUp, resumed, pendingRequests } from '../pending-requests.js';
import { t, tOr } from '../i18n.js';
import { money } from '../money.js';
import { useStore } from '../store.js';
import { OrderLink, OutcomeLink, announce } from '../ui.js';

export function RequestNotes() {
  const waiting = useStore(pendingRequests).filter((operation) => operation.problem);
  const results = useStore(resumed);
  return html`<div class="request-notes">
    ${waiting.map((operation) => html`<${Unanswered} key=${operation.id} operation=${operation} />`)}
    ${results.map((outcome) => html`<${Resumed} key=${outcome.id} outcome=${outcome} />`)}
  </div>`;
}

function Unanswered({ operation }) {
  const { problem } = operation;
  return html`<div class="note note-waiting" role="status" data-test="unanswered">
    <strong>${t('unanswered.title', { what: described(operation.steps[operation.done]) })}</strong>
    <p>${tOr(`problem.${problem.code}`, problem.title)}. ${t('unanswered.again')}</p>
    <button type="button" class="link" onClick=${() => giveUp(operation.id)}>${t('unanswered.give-up')}</button>
  </div>`;
}

function Resumed({ outcome }) {
  const { id, steps, answers, doneBefore, problem } = outcome;
  const failed = problem && steps[answers.length];
  const ending = !problem ? 'done' : problem.code === 'given_up' ? 'given-up' : answers.length ? 'refused-then' : 'refused';
  const text = t(`resumed.${ending}`, { what: failed && described(failed) });
  useEffect(() => announce(`${t('resumed.title')} ${text}`), []);
  return html`<div class=${`note note-resumed ${problem ? 'note-waiting' : 'note-good'}`} data-test="resumed" data-replayed=${String(answers.some((answer) => answer.replayed))}>
    <div>
      <strong>${t('resumed.title')}</strong>
      <ul>${steps.slice(0, answers.length).map((step, index) => html`<li key=${step.key}>
        ${described(step)}: ${t(index < doneBefore ? 'resumed.before' : answers[index].replayed ? 'resumed.replayed' : 'resumed.sent')}
        ${step.kind === 'order' && html` <${OrderLink} id=${answers[index].answer.id} />`}
      </li>`)}</ul>
      ${problem && html`<p>${text} <span lang="en">${problem.detail}</span> ${problem.step && html`<${OutcomeLink} step=${failed} />`}</p>`}
    </div>
    <button type="button" class="button-quiet" onClick=${() => dismiss(id)} aria-label=${t('close')}>✕</button>
  </div>`;
}

function described(step) {
  const amount = step.body.amount && money(step.body.amount);
  return t(`pending.${step.kind}`, { amount, what: step.body.description, user: step.body.user_id });
}
