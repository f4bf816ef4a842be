// Handles photos that are pasted, chosen or dropped: Gradio uploads a single photo, this script uploads several.
// The page sets maxMegabytes, the largest size of a file in MiB, and maxPhotos, the largest number of photos.

let chosen = [], dropMessages = [];

// Restore photos; `messages` has a message about each dropped file or folder that is not in `files`.
const choose = (files, messages = []) => {
  const input = document.querySelector("#photo input[type=file]");
  if (!input || !files.length && !messages.length) return;
  if (files.length > 1 || messages.length) {
    [chosen, dropMessages] = [[...files], messages];
    document.querySelector("#several").click();
    return;
  }
  const transfer = new DataTransfer();
  transfer.items.add(files[0]);
  input.files = transfer.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
};

// Upload the chosen photos one by one; return their files on the server, and a message for each refused photo.
// If there are more than maxPhotos, upload none, and add a message that says so.
const uploadChosen = async () => {
  const files = [], refused = [...dropMessages], photos = chosen, note = document.querySelector("#uploading p");
  if (photos.length > maxPhotos) {
    refused.push(`${photos.length} photos: this page restores up to ${maxPhotos} together. Use the command line: ` +
      "`derain restore FOLDER derained`");
    return [files, refused];
  }
  for (const [index, photo] of photos.entries()) {
    note.textContent = `Uploading ${index + 1} of ${photos.length}`;
    try {
      if (photo.size > maxMegabytes * 2 ** 20) throw new Error(`more than ${maxMegabytes} MiB`);
      const form = new FormData();
      form.append("files", photo, photo.name);
      const response = await fetch("gradio_api/upload", {method: "POST", body: form});
      const content = await response.json();
      if (!response.ok) throw new Error(content.detail);
      files.push({path: content[0], orig_name: photo.name, meta: {_type: "gradio.FileData"}});
    } catch (error) {
      refused.push(`${photo.name}: not uploaded (${error.message})`);
    }
  }
  note.textContent = "";
  return [files, refused];
};

// Return a dropped file, or the files in a dropped folder and its subfolders, without hidden files and subfolders.
// Add a message to `messages` for each file and folder that cannot be read.
const filesOf = async (entry, messages) => {
  try {
    if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
    const reader = entry.createReader(), entries = [];
    for (let part; (part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length; )
      entries.push(...part);
    const visible = entries.filter((item) => !item.name.startsWith("."));
    return (await Promise.all(visible.map((item) => filesOf(item, messages)))).flat();
  } catch (error) {
    messages.push(`${entry.name}: cannot be read (${error.message})`);
    return [];
  }
};

// Return all files of dropped files and folders, and messages about unreadable files and folders and empty folders.
const filesOfAll = async (entries) => {
  const files = [], messages = [];
  for (const entry of entries) {
    const before = files.length + messages.length;
    files.push(...await filesOf(entry, messages));
    if (files.length + messages.length === before) messages.push(`${entry.name}: this folder contains no files`);
  }
  return [files, messages];
};

const isForPhoto = (event) => event.target.matches?.("#photo input[type=file]");

document.addEventListener("paste", (event) => choose(event.clipboardData.files));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("click", (event) => { if (isForPhoto(event)) event.target.multiple = true; }, true);
document.addEventListener("change", (event) => {
  if (!isForPhoto(event) || event.target.files.length < 2) return;
  event.stopImmediatePropagation();
  choose(event.target.files);
}, true);
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  event.stopImmediatePropagation();
  event.target.dispatchEvent(new DragEvent("dragleave", {bubbles: true}));
  const files = [...event.dataTransfer.files];
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry);
  choose(...entries.some((entry) => entry.isDirectory) ? await filesOfAll(entries) : [files]);
}, true);
